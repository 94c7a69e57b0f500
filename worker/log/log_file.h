// One listed file of a log as blocks of records (docs/PROTOCOL.md §1). Plain text: block b is the records that start in
// bytes [b·piece_bytes, (b+1)·piece_bytes). Compressed, or with records over several lines: records [b·R, (b+1)·R). The
// header is no record.
#pragma once

#include <cstdint>
#include <memory>
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
  std::vector<RecordText> records;  // in file order; they lie in text
};

// One thread.
class LogFileReader {
 public:
  struct Options {
    RecordSplitter::Options records;
    bool header = true;
    uint64_t piece_bytes = 0;
    uint64_t records_per_block = 0;  // R
    // Blocks are read in any order and blocks() is asked for: what is compressed is decompressed once, into `spool`,
    // which outlives the reader and may hold other files too.
    Spool* spool = nullptr;
  };
  // `path`: where the listed file lies. DataLoss where its length or digest differs from the list's.
  static absl::StatusOr<std::unique_ptr<LogFileReader>> Open(const LogFile& file, const std::string& path,
                                                             const Options& options);

  // The first record where options.header; empty where the file has none.
  const std::string& header() const { return header_; }
  // Replaces *piece. False: the file has no such block. Without a spool, blocks must be asked for in ascending order.
  absl::StatusOr<bool> ReadBlock(uint64_t block, Piece* piece);
  // REQUIRES: a spool.
  uint64_t blocks() const;

 private:
  LogFileReader(const LogFile& file, std::string path, const Options& options);
  absl::Status ReadHeader();
  absl::Status FillSpool();
  absl::StatusOr<bool> ReadPlain(uint64_t block, Piece* piece);
  absl::StatusOr<bool> ReadSequential(uint64_t block, Piece* piece);
  absl::StatusOr<bool> ReadSpooled(uint64_t block, Piece* piece);
  // Reads up to `count` records; the header, where it stands in the way, is stepped over.
  absl::Status Take(RecordSplitter* splitter, uint64_t count, uint64_t start_limit, Piece* piece);

  const LogFile file_;
  const std::string path_;
  const Options options_;
  bool plain_ = false;  // blocks by bytes
  std::string header_;
  bool has_header_ = false;
  uint64_t header_offset_ = 0;
  // Sequential reading: the stream, and the number of the record that it gives next.
  std::unique_ptr<RecordSplitter> splitter_;
  uint64_t next_record_ = 0;
  // Spooled: block b's records are the spool's bytes [spool_begin_ + block_at_[b], spool_begin_ + block_at_[b + 1]).
  uint64_t spool_begin_ = 0;
  std::vector<uint64_t> block_at_;
};

// A file's first record, as its header; empty where there is none. DataLoss where it is longer than record_bytes_max.
absl::StatusOr<std::string> ReadHeader(const std::string& path, const RecordSplitter::Options& options);

}  // namespace hearth
