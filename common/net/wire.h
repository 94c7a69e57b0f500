// Byte layout of the messages between ranks (docs/FORMATS.md). Little-endian; of the data plane, one message a server,
// lane and step:
//
//   Header (88 bytes) · for each section: SectionHeader (24 bytes) · signs u64[count] · occurrences u32[count] (padded
//   to 8) · values dtype[count × dim] (padded to 8)
//
// A section carries one table. Signs are strictly ascending. Which of the three arrays are present is said by the
// flags. Sizes are checked against the bytes received before anything is read or allocated.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/bytes.h"

namespace hearth {

enum class MessageKind : uint16_t {
  kPull = 1,          // worker → server: signs, occurrences
  kPullReply = 2,     // server → worker: values, in the order of the pull's signs
  kPush = 3,          // worker → server: signs, occurrences, values (gradient sums over the lane's samples)
  kPushAck = 4,       // server → worker: the push is held (not: applied)
  kPrefetch = 5,      // worker → server: signs to bring into memory; a hint, may be lost
  kReadOnlyPull = 6,  // worker → server: signs; rows after step `view`, expiry judged at `view`, nothing changes
  kReadOnlyReply = 7,
  kControl = 8,     // payload after the header: one protobuf `Control`
  kEvaluation = 9,  // worker → worker 0: evaluation results
};

enum HeaderFlags : uint16_t {
  kFlagSkip = 1,  // push: the step is skipped on all ranks; only the clock moves
};

constexpr uint32_t kWireMagic = 0x48545248;  // "HRTH"
constexpr uint16_t kWireVersion = 2;

struct Header {
  uint32_t magic = kWireMagic;
  uint16_t version = kWireVersion;
  MessageKind kind = MessageKind::kPull;
  uint32_t lane = 0;
  uint16_t flags = 0;
  uint16_t sections = 0;
  uint64_t step = 0;
  uint64_t view = 0;
  uint32_t split = 0;     // evaluation: number of the split; else 0
  uint32_t time_s = 0;    // push: the log's time of the step, seconds since 1970; 0: it has none
  uint64_t n = 0;         // push: records of the whole step, over all lanes
  uint64_t next_cut = 0;  // push: first cut >= step known to the worker; 0: none known
  uint64_t body_bytes = 0;
  // Put and checked by a transport that leaves the process (common/net/seal.h); 0 before, and between threads of one.
  uint64_t body_hash = 0;    // XXH3-64 of the body, keyed by the job's token
  uint64_t tag[2] = {0, 0};  // of the header with its tag 0, and of the message's way, by the job's token
};
static_assert(sizeof(Header) == 88);

// Of a section's values.
enum class Dtype : uint8_t { kFloat32 = 0, kFloat16 = 1 };

struct SectionHeader {
  uint32_t table = 0;  // number of the table, 1-based
  uint32_t dim = 0;
  uint32_t count = 0;
  Dtype dtype = Dtype::kFloat32;
  uint8_t has_signs = 0;
  uint8_t has_occurrences = 0;
  uint8_t has_values = 0;
  uint64_t reserved = 0;
};
static_assert(sizeof(SectionHeader) == 24);

// Views into a decoded message's bytes (8-byte aligned), or into the sender's arrays.
struct Section {
  uint32_t table = 0;
  uint32_t dim = 0;
  absl::Span<const uint64_t> signs;        // [count] or empty
  absl::Span<const uint32_t> occurrences;  // [count] or empty
  absl::Span<const float> values;          // [count, dim] or empty
  uint32_t count = 0;
  absl::Span<const uint16_t> halves = {};  // kFloat16 (common/base/half.h): in the place of values
};

// What a section takes of a message, its header included. For plans.
uint64_t SectionBytesFor(uint32_t dim, uint64_t count, bool signs, bool occurrences, std::optional<Dtype> values);

// Values are float32. Fills magic, version, sections and body_bytes; body_hash and tag are 0.
Bytes EncodeMessage(Header header, absl::Span<const Section> sections);
// Space for a message whose values the caller writes itself: `values_out[i]` points at section i's [count, dim] of
// dtype.
Bytes EncodeMessageInPlace(Header header, absl::Span<const Section> sections, Dtype dtype,
                           std::vector<char*>* values_out);

struct DecodedMessage {
  Header header;
  std::vector<Section> sections;  // views into the bytes given
};
// Internal with the cause when a size, magic, version, dtype or the order of signs is wrong. That the bytes are those
// that a rank of this job sent is the transport's care. `bytes` outlives the result.
absl::StatusOr<DecodedMessage> DecodeMessage(absl::Span<const char> bytes);
// Header alone (any kind), checked.
absl::StatusOr<Header> DecodeHeader(absl::Span<const char> bytes);

// A header with opaque bytes after it: control (protobuf) and evaluation messages.
Bytes EncodeOpaque(Header header, absl::Span<const char> body);
absl::Span<const char> OpaqueBody(absl::Span<const char> bytes);  // REQUIRES: DecodeHeader succeeded

}  // namespace hearth
