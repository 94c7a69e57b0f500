// One listed file of a log as blocks of records (docs/PROTOCOL.md §1). Plain text: block b is the records that start in
// bytes [b·piece_bytes, (b+1)·piece_bytes). Compressed, or with records over several lines: records [b·R, (b+1)·R). The
// header is no record.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"
#include "worker/log/delimited.h"
#include "worker/log/text_source.h"

namespace hearth {

struct Piece {
  uint32_t file = 0;  // number in the list of files
  uint64_t block = 0;
  std::string text;
  std::vector<RecordText> records;      // in file order; they lie in text
  std::optional<uint64_t> text_digest;  // LaneReader's: Cursor.text_digest up to here
};

// One thread.
class LogFileReader {
 public:
  struct Options {
    RecordSplitter::Options records;
    bool header = true;
    uint64_t piece_bytes = 0;
    uint64_t records_per_block = 0;  // R
  };
  // `path`: where the listed file lies; it is opened once, and what is read is that file, whatever happens to the name.
  // DataLoss where its length or digest differs from the list's; also from any method, once it was written to.
  static absl::StatusOr<std::unique_ptr<LogFileReader>> Open(const LogFile& file, const std::string& path,
                                                             const Options& options);

  // The first record where options.header; empty where the file has none.
  const std::string& header() const { return header_; }
  // Whether blocks are by bytes, and each can be read by itself.
  bool plain() const { return plain_; }
  // Replaces *piece. False: the file has no such block. What is not plain gives blocks in ascending order, or those
  // that were kept in any.
  absl::StatusOr<bool> ReadBlock(uint64_t block, Piece* piece);
  // For reading in any order. What is not plain is read whole for it: once to count, once to keep.
  absl::StatusOr<uint64_t> CountBlocks();
  // `blocks`: ascending; from now on only these may be asked for. Their text goes into *spool, which outlives the
  // reader and may hold other files too.
  absl::Status Keep(const std::vector<uint64_t>& blocks, Spool* spool);

 private:
  LogFileReader(const LogFile& file, std::shared_ptr<const InputFile> input, const Options& options);
  absl::Status ReadHeader();
  absl::StatusOr<bool> ReadPlain(uint64_t block, Piece* piece);
  absl::StatusOr<bool> ReadSequential(uint64_t block, Piece* piece);
  absl::StatusOr<bool> ReadSpooled(uint64_t block, Piece* piece);
  // Reads up to `count` records; the header, where it stands in the way, is stepped over.
  absl::Status Take(RecordSplitter* splitter, uint64_t count, uint64_t start_limit, Piece* piece);

  const LogFile file_;
  const std::shared_ptr<const InputFile> input_;
  const Options options_;
  bool plain_ = false;  // blocks by bytes
  std::string header_;
  bool has_header_ = false;
  uint64_t header_offset_ = 0;
  // Sequential reading: the stream, and the number of the record that it gives next.
  std::unique_ptr<RecordSplitter> splitter_;
  uint64_t next_record_ = 0;
  // Kept: where each block's records lie.
  struct Kept {
    uint64_t begin = 0, end = 0;  // in the spool
    uint64_t offset = 0;          // of its first byte in the file
  };
  Spool* spool_ = nullptr;
  std::map<uint64_t, Kept> kept_;  // by block
};

// A file's first record, as its header; empty where there is none. DataLoss where it is longer than record_bytes_max.
absl::StatusOr<std::string> ReadHeader(const std::string& path, const RecordSplitter::Options& options);

}  // namespace hearth
