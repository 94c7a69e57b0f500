#include "worker/log/log_reader.h"

#include <xxhash.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/log_list.h"
#include "common/job/pieces.h"
#include "worker/log/json_lines.h"
#include "worker/log/log_file.h"
#include "worker/log/piece_order.h"
#include "worker/log/record_plan.h"

namespace hearth {

namespace {

constexpr uint64_t kSpoolMemoryBytesMax = 64 << 20;  // of one lane; what is longer goes to the scratch folder
constexpr uint64_t kHeadBytes = 64 << 10;            // covered by LogFile.digest
constexpr size_t kFragmentsMax = 64;                 // lines of one quoted field that are found by its end
constexpr uint64_t kJsonGlance = 16;                 // records by which a file is known as JSON lines
constexpr size_t kDeadLetterBytesMax = 1 << 20;      // listed between two batches; what is more is counted

bool IsJson(const Log& log) { return log.format() == Log::JSON_LINES; }
bool HasHeader(const Log& log) { return !IsJson(log) && log.header(); }

absl::StatusOr<RecordSplitter::Options> RecordOptions(const Job& job, const Log& log) {
  RecordSplitter::Options options;
  HEARTH_ASSIGN_OR_RETURN(options.delimiter, DelimiterOf(log.delimiter(), absl::StrCat("log \"", log.name(), "\"")));
  options.multiline = log.multiline_records();
  options.record_bytes_max = job.limits().record_bytes_max();
  return options;
}

absl::StatusOr<std::vector<std::string>> ColumnsOfHeader(const std::string& header, char delimiter,
                                                         const std::string& path) {
  std::vector<absl::string_view> fields;
  std::string scratch;
  const absl::string_view cause = SplitFields(StripByteOrderMark(header), delimiter, &fields, &scratch);
  if (!cause.empty()) {
    return absl::DataLossError(absl::StrCat(path, ": byte 0: the header has an ", cause, "; correct the header"));
  }
  if (const size_t at = header.find('\0'); at != std::string::npos) {
    return absl::DataLossError(absl::StrCat(path, ": byte ", at, ": holds a NUL byte, so it is no text; ",
                                            "write it as delimited text in UTF-8, such as CSV"));
  }
  if (const size_t at = header.find('\r'); at != std::string::npos) {
    return absl::DataLossError(absl::StrCat(path, ": byte ", at,
                                            ": a carriage return inside the header: its lines end in \\r alone, or one "
                                            "stands there by mistake; end lines in \\n: tr '\\r' '\\n'"));
  }
  std::vector<std::string> columns;
  for (const absl::string_view field : fields) columns.emplace_back(field);
  return columns;
}

// Behind faults about columns: what the file has, and where one column looks like several, by which delimiter.
std::string DescribeColumns(const std::string& path, const std::string& header, char delimiter,
                            const std::vector<std::string>& columns) {
  constexpr size_t kColumnsMax = 64;
  constexpr size_t kTextBytesMax = 2000;
  const size_t shown = std::min(columns.size(), kColumnsMax);
  std::string names = absl::Utf8SafeCHexEscape(absl::StrJoin(columns.begin(), columns.begin() + shown, ", "));
  if (shown < columns.size() || names.size() > kTextBytesMax) names = names.substr(0, kTextBytesMax) + ", …";
  std::string text =
      absl::StrCat(path, ": its header has ", columns.size(), " column", columns.size() == 1 ? "" : "s", ": ", names);
  if (header.substr(0, 1) == "{") return text + "; it looks like JSON lines: set format: JSON_LINES";
  if (columns.size() > 1) return text;
  std::vector<absl::string_view> fields;
  std::string scratch;
  for (const char other : {',', '\t', ';', '|', ' '}) {
    if (other == delimiter || !SplitFields(header, other, &fields, &scratch).empty() || fields.size() < 2) continue;
    absl::StrAppend(&text, "; by another delimiter it has ", fields.size(), ": set the log's delimiter: \"",
                    other == '\t' ? "\\\\t" : std::string(1, other), "\"");
    break;
  }
  return text;
}

// --- LogSchema ---

class SchemaCheck {
 public:
  // Reads what is there to be read; every fault becomes a line.
  void Load(const Job& job, const std::vector<Log>& logs, const std::vector<std::string>& users,
            const std::vector<SideTableFile>& side_tables, AttributeTable::Rows rows) {
    std::set<std::string> wanted;
    for (const Log& log : logs) wanted.insert(log.join().begin(), log.join().end());
    for (const SideTable& table : job.side_table()) {
      if (wanted.count(table.name()) == 0) continue;
      const auto expected = std::find_if(side_tables.begin(), side_tables.end(),
                                         [&](const SideTableFile& file) { return file.name() == table.name(); });
      auto loaded = AttributeTable::Load(job, table, expected == side_tables.end() ? nullptr : &*expected, rows);
      if (loaded.ok()) {
        tables_[table.name()] = *std::move(loaded);
      } else {
        Note(loaded.status());
      }
    }
    // Columns are judged against tables that are there; a missing one is reported already.
    for (size_t i = 0; i < logs.size(); ++i) {
      const Log& log = logs[i];
      const bool joined = std::all_of(log.join().begin(), log.join().end(), [&](const std::string& name) {
        return tables_.count(name) > 0 || !Exists(job, name);
      });
      CheckLog(job, log, i < users.size() ? users[i] : "", joined);
    }
  }

  void LoadExpressions(const Job& job, const std::vector<Log>& logs) {
    for (const std::string& fault : FaultsOfExpressions(job, logs)) {
      Note(absl::InvalidArgumentError(fault));
      expression_faults_.insert(fault);
    }
  }

  absl::Status status() const {
    if (lines_.empty()) return absl::OkStatus();
    return absl::Status(code_, absl::StrJoin(lines_, "\n"));
  }
  AttributeTables TakeTables() { return std::move(tables_); }

 private:
  static bool Exists(const Job& job, const std::string& side_table) {
    return std::any_of(job.side_table().begin(), job.side_table().end(),
                       [&](const SideTable& table) { return table.name() == side_table; });
  }
  // The code of a missing file wins, then of damaged data: nothing about columns can be known before those are mended.
  void Note(const absl::Status& status) {
    const auto rank = [](absl::StatusCode code) {
      return code == absl::StatusCode::kNotFound ? 2 : code == absl::StatusCode::kInvalidArgument ? 0 : 1;
    };
    if (lines_.empty() || rank(status.code()) > rank(code_)) code_ = status.code();
    const std::string line(status.message());
    if (std::find(lines_.begin(), lines_.end(), line) == lines_.end()) lines_.push_back(line);
  }
  // False: something is wrong. `where`: the file, or nothing, in front of what is.
  bool Compile(const Job& job, const Log& log, const std::string& user, absl::Span<const std::string> columns,
               const std::string& where) {
    std::vector<std::string> faults;
    RecordPlan::Compile(job, log, columns, tables_, user, &faults);
    const size_t name = absl::StrCat("log \"", log.name(), "\": ").size();
    bool fine = true;
    for (const std::string& fault : faults) {
      if (expression_faults_.count(fault) > 0 || expression_faults_.count(fault.substr(name)) > 0) continue;
      Note(absl::InvalidArgumentError(absl::StrCat(where, fault)));
      fine = false;
    }
    return fine;
  }
  void CheckLog(const Job& job, const Log& log, const std::string& user, bool joined) {
    const auto options = RecordOptions(job, log);
    if (!options.ok()) return Note(options.status());
    if (!HasHeader(log) && joined) {
      const std::vector<std::string> columns(log.column().begin(), log.column().end());
      if (Compile(job, log, user, columns, "") && IsJson(log)) CheckJson(job, log, user, *options);
    }
    if (IsJson(log)) return;
    std::set<std::string> headers;  // of this log's files: most have the same
    for (const std::string& listed : log.path()) {
      const std::string path = ResolvePath(job, listed);
      const std::string where = absl::StrCat("log \"", log.name(), "\"");
      if (!HasHeader(log)) {
        const absl::Status readable = CompressionOf(path).status();
        if (!readable.ok()) Note(Annotate(readable, where));
        continue;
      }
      const auto header = ReadHeader(path, *options);
      if (!header.ok()) {
        Note(Annotate(header.status(), where));
        continue;
      }
      if (header->empty() || !headers.insert(*header).second) continue;
      const auto columns = ColumnsOfHeader(*header, options->delimiter, path);
      if (!columns.ok()) {
        Note(Annotate(columns.status(), where));
      } else if (joined && !Compile(job, log, user, *columns, path + ": ")) {
        Note(absl::InvalidArgumentError(DescribeColumns(path, *header, options->delimiter, *columns)));
      }
    }
  }

  // That what the job reads is there, in the first records of some file at least: JSON names its keys in each record.
  void CheckJson(const Job& job, const Log& log, const std::string& user, const RecordSplitter::Options& options) {
    const std::string where = absl::StrCat("log \"", log.name(), "\"");
    std::set<std::string> seen, missing;
    for (const JsonFields::Column& column : RecordPlan::JsonColumns(job, log, user)) missing.insert(column.path);
    for (const std::string& rare : log.column()) missing.erase(rare);
    bool any = false;
    for (const std::string& listed : log.path()) {
      // Once all is found, of each further file only whether it is JSON.
      auto paths = ReadJsonPaths(ResolvePath(job, listed), options, missing.empty() ? kJsonGlance : kJsonHeadRecords);
      if (!paths.ok()) return Note(Annotate(paths.status(), where));
      any |= !paths->empty();
      for (const std::string& path : *paths) missing.erase(path);
      seen.insert(paths->begin(), paths->end());
    }
    if (!any || missing.empty()) return;  // none: of a directory, or empty
    for (const std::string& path : missing) {
      Note(absl::InvalidArgumentError(absl::StrCat(
          where, ": column \"", path, "\" is in none of the first records; correct the name; where it is a side ",
          "table's write TABLE.", path, ", where it is rare list it in column, where the log lacks it in ",
          "absent_column")));
    }
    constexpr size_t kPathsMax = 64;
    const size_t shown = std::min(seen.size(), kPathsMax);
    Note(absl::InvalidArgumentError(absl::StrCat(
        where, ": its first records have ", seen.size(),
        " columns: ", absl::Utf8SafeCHexEscape(absl::StrJoin(seen.begin(), std::next(seen.begin(), shown), ", ")),
        shown < seen.size() ? ", …" : "")));
  }

  AttributeTables tables_;
  std::set<std::string> expression_faults_;  // told already
  std::vector<std::string> lines_;
  absl::StatusCode code_ = absl::StatusCode::kOk;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const LogSchema>> LogSchema::Open(const Job& job, const std::vector<Log>& logs,
                                                                 const std::vector<std::string>& users,
                                                                 const std::vector<SideTableFile>& side_tables) {
  SchemaCheck check;
  check.Load(job, logs, users, side_tables, AttributeTable::Rows::kAll);
  HEARTH_RETURN_IF_ERROR(check.status());
  return std::shared_ptr<const LogSchema>(new LogSchema(check.TakeTables()));
}

absl::Status LogSchema::Check(const Job& job, const std::vector<Log>& logs, const std::vector<std::string>& users) {
  SchemaCheck check;
  check.LoadExpressions(job, logs);
  check.Load(job, logs, users, {}, AttributeTable::Rows::kNone);
  return check.status();
}

// --- LaneReader ---

namespace {

class LaneReaderImpl : public LaneReader {
 public:
  explicit LaneReaderImpl(const LaneReaderOptions& options)
      : options_(options),
        env_(options.env != nullptr ? options.env : Env::Real()),
        schema_(options.schema),
        spool_(NewSpool()),
        builder_(options.job),
        cursor_(options.start) {}

  absl::Status Start();
  absl::StatusOr<std::unique_ptr<Batch>> Next() override;

 private:
  enum class Advance { kGot, kEnd, kIdle };
  struct PieceId {
    uint32_t file = 0;
    uint64_t block = 0;
  };
  struct RecordAt {
    uint32_t piece = 0;   // in window_
    uint32_t record = 0;  // in that piece
  };
  // Files of a log may order their columns differently: one plan for each header.
  struct LogPlan {
    uint32_t log = 0;
    std::string header;
    std::unique_ptr<const RecordPlan> plan;
    RecordPlan::Tally tally;  // of records that are told with the next batch
  };

  // Pieces, in the lane's order.
  enum class Window { kNew, kSame };  // a piece is wanted for the window after this one, or for more of this one
  absl::StatusOr<Advance> NextPiece(Window window, Piece* piece);
  absl::StatusOr<bool> NextOfFile(Piece* piece);
  bool FileEnds();
  absl::StatusOr<Advance> NextFile();
  bool SegmentMayGrow() const;
  bool EpochIsOver();
  int64_t IdleAtUs() const;
  absl::Status DealPieces(uint32_t segment);
  absl::StatusOr<LogFileReader*> OpenFile(uint32_t file);
  absl::Status CompilePlan(const LogFile& file, const std::string& path, const LogFileReader& reader);
  uint64_t FirstBlock(uint32_t file) const {
    return (options_.lane + options_.lanes - file % options_.lanes) % options_.lanes;
  }
  uint32_t FirstFile() const { return files_.empty() ? 0 : files_.front().number(); }
  bool Knows(uint32_t file) const { return FindFile(files_, file) != nullptr; }
  const LogFile& FileAt(uint32_t number) const { return *FindFile(files_, number); }
  std::unique_ptr<Spool> NewSpool() const {
    return std::make_unique<Spool>(options_.scratch, kSpoolMemoryBytesMax, options_.job.limits().spool_bytes_max());
  }
  void StartEpoch(uint32_t epoch);
  Cursor Here() const;
  absl::Status Seek();

  // Windows and batches.
  absl::StatusOr<Advance> ReadWindow();
  void JudgeWindow();
  // How many records from `first` on lie, or begin, in a quoted field that the record before them opened.
  size_t FragmentsAt(const Piece& piece, size_t first) const;
  static absl::string_view TextOf(const Piece& piece, const RecordText& record);
  void ForgetTold();
  void AddDeadLetter(const LogFile& file, uint64_t offset, absl::string_view reason);
  absl::StatusOr<std::unique_ptr<Batch>> NextBatch();
  absl::StatusOr<std::unique_ptr<Batch>> NextOfWindow();
  std::unique_ptr<Batch> EndOfSegment();
  std::unique_ptr<Batch> WithoutRecords(Batch::Kind kind);
  void Stamp(Batch* batch);
  uint32_t LaneBatch(const Log& log) const;
  uint64_t RecordsPerBlock(const Log& log) const;
  const Log& LogOf(uint32_t file) const { return options_.logs[FileAt(file).log()]; }

  const LaneReaderOptions options_;
  Env* const env_;
  std::shared_ptr<const LogSchema> schema_;
  bool tails_ = false;  // some log is a directory

  // Where the lane is in the list of files.
  std::vector<LogFile> files_;  // as far as known
  uint32_t epoch_ = 0;
  std::optional<uint32_t> segment_;  // that is being read; none: between two, or before the first
  uint32_t file_ = 0;                // next file to take pieces from
  uint64_t block_ = 0;               // in file order: next block of file_
  std::vector<PieceId> dealt_;       // shuffled pieces: this lane's, in order
  bool has_dealt_ = false;
  size_t next_dealt_ = 0;
  uint32_t dealt_end_ = 0;                  // file after the segment whose pieces are dealt
  std::map<uint32_t, uint64_t> blocks_of_;  // files whose pieces were dealt before
  std::unique_ptr<Spool> spool_;
  std::map<uint32_t, std::unique_ptr<LogFileReader>> open_;
  std::vector<std::unique_ptr<LogPlan>> plans_;
  std::map<uint32_t, LogPlan*> plan_of_;  // by file

  // The window.
  std::vector<Piece> window_;
  std::optional<Piece> look_ahead_;
  absl::Status look_ahead_status_;  // why there is none, where it could not be read
  std::optional<uint64_t> chain_;   // Cursor.text_digest as of the newest piece of file_; none: not known
  uint64_t window_number_ = 0;      // of the one that is read next
  std::vector<RecordAt> valid_;
  size_t next_valid_ = 0;

  RecordPlan::Workspace workspace_;
  BatchBuilder builder_;
  Cursor cursor_;   // end of the last batch with records, end of a segment, or the beginning of what follows it
  Ledger pending_;  // counts that ride on the next batch
  std::string dead_letters_;
  std::string last_unlisted_;  // path and offset of the newest of them
  uint64_t unlisted_ = 0;      // bad records that dead_letters_ had no room for

  // Tail.
  int64_t last_batch_us_ = 0;  // when it was handed out
  bool was_idle_ = false;      // it had no records
};

absl::Status LaneReaderImpl::Start() {
  if (options_.lanes == 0 || options_.lane >= options_.lanes) {
    return absl::InvalidArgumentError(absl::StrCat("lane ", options_.lane, " of ", options_.lanes, " does not exist"));
  }
  if (schema_ == nullptr) {
    HEARTH_ASSIGN_OR_RETURN(schema_, LogSchema::Open(options_.job, options_.logs));
  }
  for (const Log& log : options_.logs) tails_ |= !log.directory().empty();
  files_ = options_.files->files();
  last_batch_us_ = env_->NowUs();
  cursor_.set_lane(options_.lane);
  cursor_.set_epoch(cursor_.epoch());
  if (cursor_.end_of_epoch()) {
    StartEpoch(cursor_.epoch() + 1);
    return absl::OkStatus();
  }
  StartEpoch(cursor_.epoch());
  if (cursor_.record() == 0) {
    file_ = std::max(cursor_.file(), FirstFile());
    block_ = FirstBlock(file_);
    window_number_ = cursor_.window();
    if (cursor_.end_of_segment()) cursor_ = Here();
    return absl::OkStatus();
  }
  if (Knows(cursor_.file())) segment_ = SegmentOf(FileAt(cursor_.file()));
  if (Knows(cursor_.file()) && (cursor_.file_ended() || FileAt(cursor_.file()).taken_off())) {
    window_number_ = cursor_.window() + 1;
    file_ = cursor_.file() + 1;
    block_ = FirstBlock(file_);
    return absl::OkStatus();
  }
  return Seek();
}

void LaneReaderImpl::StartEpoch(uint32_t epoch) {
  epoch_ = epoch;
  segment_.reset();
  file_ = FirstFile();
  block_ = FirstBlock(file_);
  window_number_ = 0;
  has_dealt_ = false;
  open_.clear();
  look_ahead_.reset();
}

// The beginning of what comes next.
Cursor LaneReaderImpl::Here() const {
  Cursor cursor;
  cursor.set_lane(options_.lane);
  cursor.set_epoch(epoch_);
  cursor.set_window(window_number_);
  cursor.set_file(file_);
  return cursor;
}

// Reads the cursor's window again and steps over what was trained of it. Its counts were told with its first batch.
absl::Status LaneReaderImpl::Seek() {
  const auto broken = [&](absl::string_view cause) {
    return absl::DataLossError(absl::StrCat("lane ", options_.lane, ": cursor {", cursor_.ShortDebugString(),
                                            "}: ", cause,
                                            "; put the log files back as they were, or start a new run (--fresh)"));
  };
  if (!Knows(cursor_.file())) return broken("the list of files has no such file");
  window_number_ = cursor_.window();
  file_ = cursor_.file();
  block_ = cursor_.block();
  if (LogOf(file_).shuffle().pieces()) {
    while (file_ > FirstFile() && SegmentOf(FileAt(file_ - 1)) == *segment_) --file_;
    HEARTH_RETURN_IF_ERROR(DealPieces(*segment_));
    while (next_dealt_ < dealt_.size() &&
           (dealt_[next_dealt_].file != cursor_.file() || dealt_[next_dealt_].block != cursor_.block())) {
      ++next_dealt_;
    }
    if (next_dealt_ == dealt_.size()) return broken("the piece is not one of this lane");
  }
  // A file that is read in sequence passes by anyway; of plain text, only one that was amended is read once more.
  bool checks = cursor_.has_text_digest() && FileAt(file_).amended();
  if (cursor_.has_text_digest() && !checks) {
    HEARTH_ASSIGN_OR_RETURN(const LogFileReader* const reader, OpenFile(file_));
    checks = !reader->plain();
  }
  for (uint64_t block = FirstBlock(file_); checks && block < cursor_.block(); block += options_.lanes) {
    block_ = block;
    Piece piece;
    HEARTH_ASSIGN_OR_RETURN(const bool got, NextOfFile(&piece));
    if (!got) return broken(absl::StrCat(FileAt(cursor_.file()).path(), " ends before what was trained of it"));
  }
  HEARTH_ASSIGN_OR_RETURN(const Advance advance, ReadWindow());
  if (advance != Advance::kGot || window_[0].file != cursor_.file() || window_[0].block != cursor_.block()) {
    return broken("there is no such piece");
  }
  if (checks && window_[0].text_digest != cursor_.text_digest()) {
    return broken(absl::StrCat(FileAt(cursor_.file()).path(), " no longer holds the records that were trained"));
  }
  if (!checks && cursor_.has_text_digest()) chain_ = window_[0].text_digest = cursor_.text_digest();
  if (cursor_.record() > valid_.size()) return broken(absl::StrCat("the window has ", valid_.size(), " valid records"));
  next_valid_ = cursor_.record();
  ForgetTold();
  return absl::OkStatus();
}

void LaneReaderImpl::ForgetTold() {
  pending_.Clear();
  dead_letters_.clear();
  unlisted_ = 0;
  for (const auto& plan : plans_) plan->tally = RecordPlan::Tally();
}

absl::StatusOr<std::unique_ptr<Batch>> LaneReaderImpl::Next() {
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<Batch> batch, NextBatch());
  was_idle_ = batch != nullptr && batch->kind == Batch::Kind::kIdle;
  last_batch_us_ = env_->NowUs();
  return batch;
}

absl::StatusOr<std::unique_ptr<Batch>> LaneReaderImpl::NextBatch() {
  while (epoch_ < options_.epochs) {
    if (next_valid_ < valid_.size()) return NextOfWindow();
    HEARTH_ASSIGN_OR_RETURN(const Advance advance, ReadWindow());
    switch (advance) {
      case Advance::kGot:
        break;
      case Advance::kIdle:
        return WithoutRecords(Batch::Kind::kIdle);
      case Advance::kEnd:
        return EndOfSegment();
    }
  }
  return std::unique_ptr<Batch>();
}

// The batch stands at the end; what follows it begins at Here().
std::unique_ptr<Batch> LaneReaderImpl::EndOfSegment() {
  const bool over = EpochIsOver();
  cursor_ = Here();
  cursor_.set_end_of_segment(true);
  cursor_.set_end_of_epoch(over);
  std::unique_ptr<Batch> batch = WithoutRecords(Batch::Kind::kAtEnd);
  segment_.reset();
  if (over) StartEpoch(epoch_ + 1);
  cursor_ = Here();
  return batch;
}

// --- batches ---

uint32_t LaneReaderImpl::LaneBatch(const Log& log) const {
  if (options_.batch_size > 0) return options_.batch_size;
  const uint32_t all = log.has_batch_size() ? log.batch_size() : options_.job.training().batch_size();
  const uint32_t mine = all / options_.lanes + (options_.lane < all % options_.lanes ? 1 : 0);
  return std::max(mine, 1u);
}

// R: the same for all lanes, so it counts the larger of the lanes' batches.
uint64_t LaneReaderImpl::RecordsPerBlock(const Log& log) const {
  const uint64_t all = log.has_batch_size() ? log.batch_size() : options_.job.training().batch_size();
  const uint64_t batch = options_.batch_size > 0 ? options_.batch_size : (all + options_.lanes - 1) / options_.lanes;
  return std::max<uint64_t>(batch, 1) * std::max(log.piece_batches(), 1u);
}

absl::StatusOr<std::unique_ptr<Batch>> LaneReaderImpl::NextOfWindow() {
  const size_t size = std::min<size_t>(LaneBatch(LogOf(window_[0].file)), valid_.size() - next_valid_);
  std::vector<uint64_t> users;
  std::vector<std::string> user_texts;
  std::string reason;
  for (size_t i = 0; i < size; ++i) {
    const Piece& piece = window_[valid_[next_valid_ + i].piece];
    const RecordText& record = piece.records[valid_[next_valid_ + i].record];
    LogPlan* const of_file = plan_of_.at(piece.file);
    const RecordPlan& plan = *of_file->plan;
    HEARTH_CHECK(plan.Check(TextOf(piece, record), &workspace_, &reason) == RecordPlan::Fate::kValid);
    plan.Fill(&workspace_, &builder_);
    plan.Count(workspace_, &of_file->tally);
    builder_.EndRecord(piece.file, record.offset);
    const absl::string_view user = plan.User(workspace_);
    if (options_.keep_user) {
      users.push_back(user.empty() ? kNoUser : std::max<uint64_t>(kNoUser + 1, XXH3_64bits(user.data(), user.size())));
    }
    if (options_.keep_user_text) user_texts.emplace_back(user);
  }
  next_valid_ += size;
  std::unique_ptr<Batch> batch = builder_.Build();
  batch->kind = Batch::Kind::kRecords;
  batch->user = std::move(users);
  batch->user_text = std::move(user_texts);
  cursor_.Clear();
  cursor_.set_lane(options_.lane);
  cursor_.set_epoch(epoch_);
  cursor_.set_window(window_number_ - 1);
  cursor_.set_record(next_valid_);
  cursor_.set_file(window_[0].file);
  cursor_.set_block(window_[0].block);
  if (window_[0].text_digest.has_value()) cursor_.set_text_digest(*window_[0].text_digest);
  if (next_valid_ == valid_.size() && FileEnds()) cursor_.set_file_ended(true);
  Stamp(batch.get());
  return batch;
}

// Whether this lane has no piece of the window's file behind the window. Reads the next one to know; an error waits
// until it is asked for.
bool LaneReaderImpl::FileEnds() {
  const uint32_t file = window_[0].file;
  if (IsShuffled(LogOf(file))) return false;
  if (!look_ahead_.has_value() && look_ahead_status_.ok() && file_ == file) {
    Piece piece;
    const absl::StatusOr<bool> got = NextOfFile(&piece);
    look_ahead_status_ = got.status();
    if (got.ok() && *got) look_ahead_ = std::move(piece);
  }
  return look_ahead_status_.ok() && !look_ahead_.has_value() && file_ > file;
}

std::unique_ptr<Batch> LaneReaderImpl::WithoutRecords(Batch::Kind kind) {
  std::unique_ptr<Batch> batch = builder_.Build();
  batch->kind = kind;
  if (kind == Batch::Kind::kAtEnd) {
    Stamp(batch.get());
  } else {
    // The cursor stands still, so what was read since (windows without a valid record) would be read again after a
    // resume: it is told with the next batch that moves the cursor.
    batch->lane = options_.lane;
    batch->epoch = epoch_;
    batch->cursor = cursor_;
  }
  return batch;
}

void LaneReaderImpl::Stamp(Batch* batch) {
  batch->lane = options_.lane;
  batch->epoch = epoch_;
  batch->cursor = cursor_;
  batch->delta.set_read(static_cast<uint64_t>(batch->records) + pending_.rejected() + pending_.filtered());
  batch->delta.set_rejected(pending_.rejected());
  batch->delta.set_filtered(pending_.filtered());
  if (unlisted_ > 0) {
    absl::StrAppend(&dead_letters_, last_unlisted_, "\tand ", unlisted_,
                    " bad records up to here that are not listed\n");
  }
  batch->dead_letters = std::move(dead_letters_);
  for (const auto& plan : plans_) plan->plan->Tell(&plan->tally, &batch->reading);
  ForgetTold();
}

// --- windows ---

absl::StatusOr<LaneReaderImpl::Advance> LaneReaderImpl::ReadWindow() {
  window_.clear();
  valid_.clear();
  next_valid_ = 0;
  HEARTH_RETURN_IF_ERROR(look_ahead_status_);
  if (look_ahead_.has_value()) {
    window_.push_back(*std::move(look_ahead_));
    look_ahead_.reset();
  } else {
    Piece piece;
    HEARTH_ASSIGN_OR_RETURN(const Advance advance, NextPiece(Window::kNew, &piece));
    if (advance != Advance::kGot) return advance;
    window_.push_back(std::move(piece));
  }
  const uint64_t records_max = LogOf(window_[0].file).shuffle().window_records_max();
  uint64_t records = window_[0].records.size();
  while (records_max > 0) {
    Piece piece;
    HEARTH_ASSIGN_OR_RETURN(const Advance advance, NextPiece(Window::kSame, &piece));
    if (advance != Advance::kGot) break;
    records += piece.records.size();
    if (records > records_max) {
      look_ahead_ = std::move(piece);
      break;
    }
    window_.push_back(std::move(piece));
  }
  JudgeWindow();
  if (records_max > 0) {
    Shuffle(WindowShuffleSeed(options_.job.seed(), epoch_, options_.lane, window_number_), &valid_);
  }
  ++window_number_;
  return Advance::kGot;
}

// A file without a header may begin with a byte order mark, which is no part of its first record.
absl::string_view LaneReaderImpl::TextOf(const Piece& piece, const RecordText& record) {
  const absl::string_view text(piece.text.data() + record.begin, record.size);
  return record.offset == 0 ? StripByteOrderMark(text) : text;
}

// The quote is closed by the first one that a delimiter or the line's end follows. A stray quote, which nothing near
// closes, opened nothing.
size_t LaneReaderImpl::FragmentsAt(const Piece& piece, size_t first) const {
  const std::string& named = LogOf(piece.file).delimiter();
  const char delimiter = named == "\\t" ? '\t' : named[0];
  const size_t end = std::min(piece.records.size(), first + kFragmentsMax);
  for (size_t i = first; i < end; ++i) {
    const absl::string_view text(piece.text.data() + piece.records[i].begin, piece.records[i].size);
    for (size_t at = text.find('"'); at != absl::string_view::npos; at = text.find('"', at + 1)) {
      if (at + 1 < text.size() && text[at + 1] == '"') {
        ++at;  // "" is one quote of the field
        continue;
      }
      if (at + 1 == text.size() || text[at + 1] == delimiter) return i + 1 - first;
      return 0;
    }
  }
  return 0;
}

void LaneReaderImpl::JudgeWindow() {
  std::string reason;
  for (size_t i = 0; i < window_.size(); ++i) {
    const Piece& piece = window_[i];
    const LogFile& file = FileAt(piece.file);
    if (piece.records.empty()) continue;
    LogPlan* const of_file = plan_of_.at(piece.file);
    const absl::string_view header = StripByteOrderMark(of_file->header);
    const Log& log = LogOf(piece.file);
    size_t fragments = 0;  // records from here on that are no records of their own
    for (size_t k = 0; k < piece.records.size(); ++k) {
      const RecordText& record = piece.records[k];
      const absl::string_view text = TextOf(piece, record);
      RecordPlan::Fate fate = RecordPlan::Fate::kBad;
      if (fragments > 0) {
        --fragments;
        reason = "begins inside a quoted field of the record before it; set multiline_records: true for this log";
      } else if (record.too_long) {
        reason = absl::StrCat("longer than limits.record_bytes_max, ", options_.job.limits().record_bytes_max());
      } else if (!header.empty() && StripByteOrderMark(text) == header) {
        reason = "is the header once more";
      } else {
        fate = of_file->plan->Check(text, &workspace_, &reason);
        if (fate == RecordPlan::Fate::kBad && !log.multiline_records() && reason == kUnterminatedQuote) {
          fragments = FragmentsAt(piece, k + 1);
          reason = fragments > 0 ? "a newline inside quotes; set multiline_records: true for this log"
                                 : "unterminated quote; a field with a newline needs multiline_records: true";
        }
        if (fate != RecordPlan::Fate::kValid) of_file->plan->Count(workspace_, &of_file->tally);
      }
      switch (fate) {
        case RecordPlan::Fate::kValid:
          valid_.push_back({static_cast<uint32_t>(i), static_cast<uint32_t>(k)});
          break;
        case RecordPlan::Fate::kFiltered:
          pending_.set_filtered(pending_.filtered() + 1);
          break;
        case RecordPlan::Fate::kBad:
          pending_.set_rejected(pending_.rejected() + 1);
          std::replace_if(
              reason.begin(), reason.end(), [](char c) { return c == '\t' || c == '\n' || c == '\r'; }, ' ');
          AddDeadLetter(file, record.offset, reason);
          break;
      }
    }
  }
}

// Bounded, because a log may go on without a valid record, and so without a batch that takes them away.
void LaneReaderImpl::AddDeadLetter(const LogFile& file, uint64_t offset, absl::string_view reason) {
  if (dead_letters_.size() < kDeadLetterBytesMax) {
    absl::StrAppend(&dead_letters_, file.path(), "\t", offset, "\t", reason, "\n");
    return;
  }
  ++unlisted_;
  last_unlisted_ = absl::StrCat(file.path(), "\t", offset);
}

// --- pieces ---

// Whether a file that is not listed yet may be of the segment that is being read. Files of a log with paths are listed
// all at once, and a directory's file may be a segment of its own.
bool LaneReaderImpl::SegmentMayGrow() const {
  if (!segment_.has_value()) return true;
  const Log& log = options_.logs[files_.back().log()];
  return !log.directory().empty() && log.cut_after() == Log::LOG;
}

// Makes sure that file_ is known; kEnd where the segment ends before it.
absl::StatusOr<LaneReaderImpl::Advance> LaneReaderImpl::NextFile() {
  while (true) {
    if (Knows(file_)) {
      const LogFile& file = FileAt(file_);
      if (file.log() >= options_.logs.size()) {
        return absl::InternalError(
            absl::StrCat(file.path(), ": is of log ", file.log(), "; there are ", options_.logs.size()));
      }
      if (!segment_.has_value()) segment_ = SegmentOf(file);
      return SegmentOf(file) == *segment_ ? Advance::kGot : Advance::kEnd;
    }
    if (!SegmentMayGrow()) return Advance::kEnd;
    // Closed first, then the list: what was appended before the closing is seen.
    const bool closed = options_.files->closed();
    const size_t known = files_.size();
    files_ = options_.files->files();
    if (files_.size() > known) continue;
    if (closed) return Advance::kEnd;
    options_.files->WaitForMore(known, tails_ ? IdleAtUs() : kNever);
    if (options_.files->files().size() == known && !options_.files->closed()) return Advance::kIdle;
  }
}

// REQUIRES: a segment has ended.
bool LaneReaderImpl::EpochIsOver() {
  const bool closed = options_.files->closed();
  files_ = options_.files->files();
  return closed && !Knows(file_);
}

// When a dry lane joins with an empty batch. Measured from its last batch, not from now: the lanes of a worker are
// asked in turn, and while the first one waits the others are dry as well.
int64_t LaneReaderImpl::IdleAtUs() const {
  const bool job_rests = options_.job_rests == nullptr || *options_.job_rests;
  if (was_idle_ && !job_rests) return last_batch_us_;
  return last_batch_us_ + int64_t{1000} * options_.job.training().idle_ms();
}

absl::StatusOr<LaneReaderImpl::Advance> LaneReaderImpl::NextPiece(Window window, Piece* piece) {
  while (true) {
    if (has_dealt_) {
      if (next_dealt_ < dealt_.size()) {
        const PieceId id = dealt_[next_dealt_];
        HEARTH_ASSIGN_OR_RETURN(LogFileReader* const reader, OpenFile(id.file));
        HEARTH_ASSIGN_OR_RETURN(const bool got, reader->ReadBlock(id.block, piece));
        HEARTH_CHECK(got);
        ++next_dealt_;
        return Advance::kGot;
      }
      // The dealt segment is over. Its files stay open until someone asks for what comes after it.
      if (window == Window::kSame) return Advance::kEnd;
      has_dealt_ = false;
      file_ = dealt_end_;
      block_ = FirstBlock(file_);
      open_.clear();
      spool_ = NewSpool();
    }
    HEARTH_ASSIGN_OR_RETURN(const Advance advance, NextFile());
    if (advance != Advance::kGot) return advance;
    if (LogOf(file_).shuffle().pieces()) {
      HEARTH_RETURN_IF_ERROR(DealPieces(*segment_));
      continue;
    }
    HEARTH_ASSIGN_OR_RETURN(const bool got, NextOfFile(piece));
    if (got) return Advance::kGot;
  }
}

// The lane's next piece of file_; false, at the next file: there is none. REQUIRES: file_ is known, and its log's
// pieces are not shuffled.
absl::StatusOr<bool> LaneReaderImpl::NextOfFile(Piece* piece) {
  const uint64_t first = FirstBlock(file_);
  bool got = false;
  if (!FileAt(file_).taken_off()) {
    HEARTH_ASSIGN_OR_RETURN(LogFileReader* const reader, OpenFile(file_));
    HEARTH_ASSIGN_OR_RETURN(got, reader->ReadBlock(block_, piece));
  }
  if (!got) {
    open_.clear();
    ++file_;
    block_ = FirstBlock(file_);
    return false;
  }
  if (block_ == first) chain_ = 0;
  if (chain_.has_value()) chain_ = XXH3_64bits_withSeed(piece->text.data(), piece->text.size(), *chain_);
  piece->text_digest = IsShuffled(LogOf(file_)) ? std::nullopt : chain_;
  block_ += options_.lanes;
  return true;
}

// Permutes the pieces of the segment that begins at file_, and keeps this lane's.
absl::Status LaneReaderImpl::DealPieces(uint32_t segment) {
  std::vector<PieceId> all;
  dealt_end_ = file_;
  for (; Knows(dealt_end_) && SegmentOf(FileAt(dealt_end_)) == segment; ++dealt_end_) {
    if (FileAt(dealt_end_).taken_off()) continue;
    auto blocks = blocks_of_.find(dealt_end_);
    if (blocks == blocks_of_.end()) {
      HEARTH_ASSIGN_OR_RETURN(LogFileReader* const reader, OpenFile(dealt_end_));
      HEARTH_ASSIGN_OR_RETURN(const uint64_t counted, reader->CountBlocks());
      blocks = blocks_of_.emplace(dealt_end_, counted).first;
    }
    for (uint64_t block = 0; block < blocks->second; ++block) all.push_back({dealt_end_, block});
  }
  Shuffle(PieceShuffleSeed(options_.job.seed(), epoch_, segment), &all);
  dealt_.clear();
  std::map<uint32_t, std::vector<uint64_t>> own;  // by file
  for (size_t i = options_.lane; i < all.size(); i += options_.lanes) {
    dealt_.push_back(all[i]);
    own[all[i].file].push_back(all[i].block);
  }
  for (auto& [file, blocks] : own) {
    std::sort(blocks.begin(), blocks.end());
    HEARTH_ASSIGN_OR_RETURN(LogFileReader* const reader, OpenFile(file));
    HEARTH_RETURN_IF_ERROR(reader->Keep(blocks, spool_.get()));
  }
  has_dealt_ = true;
  next_dealt_ = 0;
  return absl::OkStatus();
}

// One file is open in file order, all files of a log whose pieces are shuffled.
absl::StatusOr<LogFileReader*> LaneReaderImpl::OpenFile(uint32_t number) {
  const auto found = open_.find(number);
  if (found != open_.end()) return found->second.get();
  const LogFile& file = FileAt(number);
  if (file.number() != number) {
    return absl::InternalError(
        absl::StrCat(file.path(), ": is file ", file.number(), " at place ", number, " of the list"));
  }
  const Log& log = options_.logs[file.log()];
  LogFileReader::Options options;
  HEARTH_ASSIGN_OR_RETURN(options.records, RecordOptions(options_.job, log));
  options.header = HasHeader(log);
  options.piece_bytes = std::max<uint64_t>(PieceBytes(log), 1);
  options.records_per_block = RecordsPerBlock(log);
  const std::string path = ResolvePath(options_.job, file.path());
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<LogFileReader> reader, LogFileReader::Open(file, path, options));
  HEARTH_RETURN_IF_ERROR(CompilePlan(file, path, *reader));
  return open_.emplace(number, std::move(reader)).first->second.get();
}

absl::Status LaneReaderImpl::CompilePlan(const LogFile& file, const std::string& path, const LogFileReader& reader) {
  const Log& log = options_.logs[file.log()];
  if (HasHeader(log) && reader.header().empty()) return absl::OkStatus();  // an empty file
  for (const auto& known : plans_) {
    if (known->log == file.log() && known->header == reader.header()) {
      plan_of_[file.number()] = known.get();
      return absl::OkStatus();
    }
  }
  std::vector<std::string> columns(log.column().begin(), log.column().end());
  HEARTH_ASSIGN_OR_RETURN(const char delimiter, DelimiterOf(log.delimiter(), absl::StrCat("log \"", log.name(), "\"")));
  if (HasHeader(log)) {
    HEARTH_ASSIGN_OR_RETURN(columns, ColumnsOfHeader(reader.header(), delimiter, path));
  }
  std::vector<std::string> faults;
  auto made = std::make_unique<LogPlan>();
  made->log = file.log();
  made->header = reader.header();
  made->plan = RecordPlan::Compile(options_.job, log, columns, schema_->tables(), options_.user_column, &faults);
  if (made->plan == nullptr) {
    if (HasHeader(log)) faults.push_back(DescribeColumns(path, reader.header(), delimiter, columns));
    const char* const remedy =
        log.directory().empty() ? "" : "\nif it is no file of this log, take it out of the directory and start again";
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", absl::StrJoin(faults, "\n"), remedy));
  }
  plan_of_[file.number()] = made.get();
  plans_.push_back(std::move(made));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<LaneReader>> LaneReader::Open(const LaneReaderOptions& options) {
  auto reader = std::make_unique<LaneReaderImpl>(options);
  HEARTH_RETURN_IF_ERROR(reader->Start());
  return std::unique_ptr<LaneReader>(std::move(reader));
}

// --- lists and base rates ---

absl::StatusOr<std::vector<LogFile>> ListLogFiles(const Job& job, const std::vector<Log>& logs) {
  std::vector<LogFile> files;
  for (size_t i = 0; i < logs.size(); ++i) {
    for (const std::string& path : logs[i].path()) {
      LogFile file;
      file.set_number(static_cast<uint32_t>(files.size()));
      file.set_path(path);
      file.set_log(static_cast<uint32_t>(i));
      const bool begins = !files.empty() && BeginsSegment(files.back(), file.log(), logs[i]);
      file.set_segment(files.empty() ? 0 : files.back().segment() + (begins ? 1 : 0));
      const std::string resolved = ResolvePath(job, path);
      HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(resolved));
      HEARTH_ASSIGN_OR_RETURN(const uint64_t digest, HashFileHead(resolved, kHeadBytes));
      file.set_bytes(bytes);
      file.set_digest(digest);
      files.push_back(std::move(file));
    }
  }
  return files;
}

namespace {

struct LabelCounts {
  std::vector<uint64_t> labelled, positives;  // by task
};

// Adds the labels of the first records_max valid records of one log, in file order.
absl::Status CountLabels(const Job& job, const std::shared_ptr<const LogSchema>& schema, uint32_t log,
                         const std::vector<LogFile>& all_files, uint64_t records_max, LabelCounts* counts) {
  FileList files(Env::Real());
  std::vector<LogFile> of_log;
  for (LogFile file : all_files) {
    if (file.log() != log) continue;
    // A log that is trained file by file may have no more than its first one yet.
    if (job.log(static_cast<int>(log)).cut_after() == Log::FILE && !of_log.empty()) break;
    file.set_number(static_cast<uint32_t>(of_log.size()));
    of_log.push_back(std::move(file));
  }
  files.Append(of_log, true);
  LaneReaderOptions options;
  options.job = job;
  options.logs.assign(job.log().begin(), job.log().end());
  options.schema = schema;
  options.files = &files;
  options.batch_size = static_cast<uint32_t>(std::min<uint64_t>(records_max, 1024));
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<LaneReader> reader, LaneReader::Open(options));
  const size_t tasks = job.task_size();
  for (uint64_t records = 0; records < records_max;) {
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<Batch> batch, reader->Next());
    if (batch == nullptr || batch->cursor.end_of_epoch()) break;
    const uint64_t taken = std::min<uint64_t>(records_max - records, static_cast<uint64_t>(batch->records));
    for (size_t i = 0; i < taken * tasks; ++i) {
      counts->labelled[i % tasks] += batch->mask[i] != 0;
      counts->positives[i % tasks] += batch->mask[i] != 0 && batch->labels[i] != 0;
    }
    records += taken;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<double>> CountBaseRates(const Job& job, const std::shared_ptr<const LogSchema>& schema,
                                                   const std::vector<LogFile>& files, uint64_t records_max) {
  // Labels alone, in file order; RAW slots stay because they decide which records are valid.
  Job bare = job;
  bare.clear_dense();
  bare.clear_slot();
  for (const Slot& slot : job.slot()) {
    if (slot.hash() == Slot::RAW) *bare.add_slot() = slot;
  }
  for (Log& log : *bare.mutable_log()) {
    log.clear_shuffle();
    log.clear_piece_batches();
  }
  LabelCounts counts;
  counts.labelled.resize(job.task_size());
  counts.positives.resize(job.task_size());
  const bool all_given =
      std::all_of(job.task().begin(), job.task().end(), [](const Task& t) { return t.has_base_rate(); });
  for (int log = 0; log < job.log_size() && !all_given && records_max > 0; ++log) {
    HEARTH_RETURN_IF_ERROR(CountLabels(bare, schema, static_cast<uint32_t>(log), files, records_max, &counts));
  }
  std::vector<double> rates;
  for (int task = 0; task < job.task_size(); ++task) {
    const double counted =
        (static_cast<double>(counts.positives[task]) + 0.5) / (static_cast<double>(counts.labelled[task]) + 1.0);
    rates.push_back(job.task(task).has_base_rate() ? job.task(task).base_rate() : counted);
  }
  return rates;
}

}  // namespace hearth
