#include "scripts/hearth/relay.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace hearth {

namespace {

constexpr size_t kAtOnceBytes = 4096;  // a pipe that can be written takes as many
constexpr size_t kLineBytesMax = 8192;
constexpr size_t kRefusalBytesMax = 600;
constexpr int kMessageLinesMax = 100;

void AppendBounded(absl::string_view text, size_t bytes_max, std::string* to) {
  if (to->size() < bytes_max) to->append(text.data(), std::min(text.size(), bytes_max - to->size()));
}

// Its first paragraphs, in one line. What ends in a colon goes on behind that, unless a list of
// guesses follows.
void AppendParagraphs(absl::string_view text, int paragraphs_max, std::string* line) {
  std::string introduction;
  bool began = false;
  for (absl::string_view one : absl::StrSplit(text, '\n')) {
    one = absl::StripAsciiWhitespace(one);
    if (one.empty()) {
      if (began && introduction.empty() && --paragraphs_max == 0) return;
      began = false;
      continue;
    }
    if (absl::StartsWith(one, "[")) continue;  // says where, not why
    if (!introduction.empty() && (one[0] == '*' || one[0] == '-')) return;
    began = true;
    const std::string words = absl::StrCat(introduction, introduction.empty() ? "" : " ", one);
    introduction = one.back() == ':' ? words : "";
    if (introduction.empty()) AppendBounded(absl::StrCat(line->empty() ? "" : " ", words), kRefusalBytesMax, line);
  }
}

bool IsRule(absl::string_view line) {
  line = absl::StripTrailingAsciiWhitespace(line);
  const auto all = [line](char c) { return line.find_first_not_of(c) == absl::string_view::npos; };
  return line.size() >= 40 && (all('-') || all('*'));
}
// "[host:123] *** An error occurred in …", "[host:123] 1 more process has sent help message …", and how to see it.
bool IsOfMpi(absl::string_view line) {
  return absl::StartsWith(line, "[") &&
         (absl::StrContains(line, "] *** ") || absl::StrContains(line, "sent help message") ||
          absl::StrContains(line, "orte_base_help_aggregate"));
}

}  // namespace

// A whole line, with its newline, that was held back.
void MpirunFilter::EndLine(std::string* passed) {
  if (IsRule(line_)) {
    message_lines_ = message_lines_ == 0 ? 1 : 0;
    AppendBounded("\n", kKeptBytesMax, &messages_);
  } else if (message_lines_ > 0) {
    AppendBounded(line_, kKeptBytesMax, &messages_);
    if (++message_lines_ > kMessageLinesMax) message_lines_ = 0;  // those dashes were nobody's frame
  } else if (IsOfMpi(line_)) {
    AppendBounded(line_, kKeptBytesMax, &messages_);
  } else {
    passed->append(line_);
    AppendBounded(line_, kLineBytesMax, &others_);
  }
  line_.clear();
}

// Of the ranks each line that is told says who they are.
void MpirunFilter::EndPassing() {
  if (!absl::StrContains(passing_, "hearth")) AppendBounded(passing_, kLineBytesMax, &others_);
  passing_.clear();
}

void MpirunFilter::Take(absl::string_view text, std::string* passed) {
  while (!text.empty()) {
    const size_t newline = text.find('\n');
    const absl::string_view part = text.substr(0, newline == absl::string_view::npos ? newline : newline + 1);
    text.remove_prefix(part.size());
    const bool hold =
        !line_.empty() || (at_begin_ && (message_lines_ > 0 || part[0] == '-' || part[0] == '*' || part[0] == '['));
    at_begin_ = part.back() == '\n';
    if (hold) {
      line_.append(part.data(), part.size());
      if (at_begin_ || line_.size() > kLineBytesMax) EndLine(passed);
      continue;
    }
    passed->append(part.data(), part.size());
    AppendBounded(part, kLineBytesMax, &passing_);
    if (at_begin_) EndPassing();
  }
}

void MpirunFilter::Finish(std::string* passed) {
  if (!line_.empty()) EndLine(passed);
  EndPassing();
}

Relay::~Relay() {
  if (from_ >= 0) close(from_);
}

void Relay::Read() {
  char buffer[16 << 10];
  const ssize_t got = read(from_, buffer, sizeof(buffer));
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) return Close();
  const absl::string_view text(buffer, static_cast<size_t>(got));
  if (filters_) {
    filter_.Take(text, &waiting_);
  } else {
    waiting_.append(text.data(), text.size());
  }
}

void Relay::Close() {
  if (from_ < 0) return;
  close(from_);
  from_ = -1;
  filter_.Finish(&waiting_);
}

void Relay::Write() {
  if (!status_.ok()) waiting_.clear();
  if (waiting_.empty()) return;
  const ssize_t written = write(to_, waiting_.data(), std::min(waiting_.size(), kAtOnceBytes));
  if (written < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (written < 0) {
    const std::string text = absl::StrCat(to_ == STDOUT_FILENO ? "standard output" : "standard error",
                                          ": cannot write: ", std::strerror(errno));
    status_ = errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? absl::ResourceExhaustedError(text)
                                                                   : absl::UnavailableError(text);
    waiting_.clear();
    return;
  }
  waiting_.erase(0, static_cast<size_t>(written));
}

std::string RefusalOf(const MpirunFilter& filter) {
  std::string line;
  AppendParagraphs(filter.others(), 1, &line);
  AppendParagraphs(filter.messages(), 3, &line);
  return line;
}

}  // namespace hearth
