// The proof that what comes from the network was sent by a rank of this job (docs/FORMATS.md, "Messages between ranks";
// docs/SECURITY.md says what it holds off, and what it does not).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/bytes.h"
#include "common/net/mailbox.h"

namespace hearth {

// In a rank's environment: its job's token, 32 hexadecimal digits. Never on a command line, which every user can read.
constexpr char kJobTokenVariable[] = "HEARTH_JOB_TOKEN";

// 128 bits that the ranks of one start share, and nobody else knows. All zero: ranks that were started by hand, without
// one; they speak to each other, and anyone can speak to them.
class JobToken {
 public:
  JobToken() = default;
  static absl::StatusOr<JobToken> Random();  // from the kernel
  // InvalidArgument, without the text, where `hex` is not 32 digits.
  static absl::StatusOr<JobToken> Parse(absl::string_view hex);
  // kJobTokenVariable's, which is then taken out of the environment: children have no use for it. Not there: zero.
  // REQUIRES: no other thread looks at the environment.
  static absl::StatusOr<JobToken> TakeFromEnvironment();

  std::string Hex() const;
  const std::array<uint8_t, 16>& bytes() const { return bytes_; }

 private:
  std::array<uint8_t, 16> bytes_ = {};
};

using SealTag = std::array<uint64_t, 2>;

// Puts and checks proofs with one token. Thread-safe.
class Seal {
 public:
  explicit Seal(const JobToken& token);
  ~Seal();

  // Fills the header's body_hash and tag, for this way and no other. REQUIRES: a whole message (EncodeMessage,
  // EncodeOpaque).
  void Put(Address from, Address to, Bytes* message) const;
  // Internal with the cause where the message was not sealed by this token for this way, or was altered since. The tag
  // is checked first, over the header alone; nothing else of a message that has no right one is looked at.
  absl::Status Check(Address from, Address to, absl::Span<const char> message) const;

  // For raw bytes, which have no header: the tag of the `number`th buffer from one rank to another.
  uint64_t HashOf(absl::Span<const char> bytes) const;
  SealTag TagOfBuffer(int from_rank, int to_rank, uint64_t number, uint64_t bytes, uint64_t hash) const;

 private:
  struct Keyed;
  SealTag Mac(absl::Span<const char> text) const;
  SealTag MacOfHeader(Address from, Address to, const char* header) const;

  const std::unique_ptr<Keyed> keyed_;
};

}  // namespace hearth
