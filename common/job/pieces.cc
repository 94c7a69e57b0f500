#include "common/job/pieces.h"

#include <algorithm>

#include "common/base/file.h"
#include "common/job/config.h"

namespace hearth {

namespace {

constexpr uint64_t kPieceBytesMin = 4096;
constexpr uint64_t kBalancedPiecesMax = 16;  // a lane: with more of the largest, one more or less is no matter
constexpr uint64_t kShuffledPieces = 16;     // a lane: something to shuffle
constexpr uint64_t kPiecesOfManyFiles = 4;   // a lane: a file's last piece is a short one

}  // namespace

uint64_t PieceBytes(const Log& log) { return log.has_piece_bytes() ? log.piece_bytes() : kPieceBytesMax; }

void DecidePieces(Job* job) {
  const uint64_t lanes = std::max<uint64_t>(1, job->training().lanes());
  for (Log& log : *job->mutable_log()) {
    if (log.has_piece_bytes() || !log.directory().empty()) continue;
    uint64_t bytes = 0;
    // A log that is trained file by file may have one file now and a hundred one day.
    const int files = log.cut_after() == Log::FILE ? std::min(1, log.path_size()) : log.path_size();
    for (int i = 0; i < files; ++i) bytes += FileBytes(ResolvePath(*job, log.path(i))).value_or(0);
    const uint64_t largest = (bytes + lanes * kPieceBytesMax - 1) / (lanes * kPieceBytesMax);  // a lane, of the largest
    if (bytes == 0 || largest > kBalancedPiecesMax) {
      log.set_piece_bytes(kPieceBytesMax);
      continue;
    }
    const uint64_t wanted = log.shuffle().pieces() ? kShuffledPieces : files > 1 ? kPiecesOfManyFiles : 1;
    const uint64_t pieces = lanes * std::max(largest, wanted);
    log.set_piece_bytes(std::max(kPieceBytesMin, (bytes + pieces - 1) / pieces));
  }
}

}  // namespace hearth
