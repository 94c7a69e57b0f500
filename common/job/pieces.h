// How large the pieces of a log are (docs/PROTOCOL.md §1) where its job does not say it.
#pragma once

#include "common/proto/job.pb.h"

namespace hearth {

// Of plain text. A larger log has pieces of this size, and so does one whose size nobody asked for.
constexpr uint64_t kPieceBytesMax = 4 << 20;

// log.piece_bytes as it is meant.
uint64_t PieceBytes(const Log& log);

// Fills in log.piece_bytes from the sizes of the log's files, so that every lane of a small log has as much to read as
// the others: once, at a job's first start, for pieces decide the model's bits. A directory, whose files are still to
// come, is left as it is, and so are files that cannot be seen. REQUIRES: the lanes are known.
void DecidePieces(Job* job);

}  // namespace hearth
