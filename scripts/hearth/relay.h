// Between mpirun and our standard output or error: the ranks' text goes on at once, mpirun's own is kept back.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace hearth {

// mpirun says what it has to say between two lines of dashes. Text of the ranks begins with no dash, and passes as it
// comes, unfinished lines too: a progress line that is drawn again and again ends in none.
class MpirunFilter {
 public:
  // What of `text` is to go on, appended to `passed`.
  void Take(absl::string_view text, std::string* passed);
  void Finish(std::string* passed);  // at the end of the text
  // What mpirun said, at most kKeptBytesMax.
  const std::string& messages() const { return messages_; }
  // The first lines that passed and do not say that they are ours: ssh's, say.
  const std::string& others() const { return others_; }

  static constexpr size_t kKeptBytesMax = 64 << 10;

 private:
  void EndLine(std::string* passed);
  void EndPassing();

  std::string line_;       // held back: a line that may be mpirun's
  bool at_begin_ = true;   // of a line
  int message_lines_ = 0;  // 1 + those since the line of dashes that is not closed yet; 0: none is open
  std::string passing_;    // the line that passes, its beginning
  std::string messages_, others_;
};

// Bytes from a pipe of ours to a descriptor, without ever waiting for its reader for long: a signal is to be heard.
class Relay {
 public:
  // Owns `from`, which does not block.
  Relay(int from, int to, bool filter) : from_(from), to_(to), filters_(filter) {}
  ~Relay();
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  int reads() const { return from_ >= 0 && waiting_.size() < kWaitingBytesMax ? from_ : -1; }  // to poll; -1: nothing
  int writes() const { return waiting_.empty() ? -1 : to_; }
  bool open() const { return from_ >= 0; }
  void Read();   // what is there, at most a buffer
  void Write();  // a part that a pipe with room takes at once
  void Close();  // nobody writes to the pipe any more: the filter gives up what it holds
  const MpirunFilter& filter() const { return filter_; }
  const absl::Status& status() const { return status_; }  // the first error of writing; what comes later is dropped

 private:
  static constexpr size_t kWaitingBytesMax = 64 << 10;
  int from_;
  const int to_;
  const bool filters_;
  MpirunFilter filter_;
  std::string waiting_;
  absl::Status status_;
};

// One line for people: why mpirun started nothing. Empty where it said nothing.
std::string RefusalOf(const MpirunFilter& filter);

}  // namespace hearth
