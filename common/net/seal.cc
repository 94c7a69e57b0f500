#include "common/net/seal.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <sys/random.h>
#if __has_include(<xxh_x86dispatch.h>)  // the same hash with the vectors that this CPU has: three times as fast
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "common/base/status.h"
#include "common/net/wire.h"

namespace hearth {
namespace {

constexpr size_t kSha256Bytes = 32;
constexpr size_t kSecretBytes = 192;  // XXH3's own default length

// What a tag is computed of, beside a header with its tag 0. No two kinds of text begin alike: a header begins with its
// magic.
struct Way {
  int32_t from_rank, from_port, to_rank, to_port;
};
struct SecretText {
  char label[8] = {'h', 'a', 's', 'h', ' ', 'k', 'e', 'y'};
  uint64_t number = 0;
};
struct BufferText {
  char label[8] = {'e', 'x', 'c', 'h', 'a', 'n', 'g', 'e'};
  uint64_t number = 0;
  uint64_t bytes = 0;
  uint64_t hash = 0;
  int32_t from_rank = 0, to_rank = 0;
};
static_assert(sizeof(Way) == 16 && sizeof(SecretText) == 16 && sizeof(BufferText) == 40);

using MacContext = std::unique_ptr<EVP_MAC_CTX, decltype(&EVP_MAC_CTX_free)>;

template <typename T>
absl::Span<const char> AsBytes(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

absl::Status Refused(absl::string_view cause) { return absl::InternalError(cause); }

}  // namespace

absl::StatusOr<JobToken> JobToken::Random() {
  JobToken token;
  ssize_t got;
  do {
    got = getrandom(token.bytes_.data(), token.bytes_.size(), 0);
  } while (got < 0 && errno == EINTR);
  if (got == static_cast<ssize_t>(token.bytes_.size())) return token;
  return absl::UnavailableError(absl::StrCat("the kernel gives no random bytes: ", std::strerror(errno)));
}

absl::StatusOr<JobToken> JobToken::Parse(absl::string_view hex) {
  JobToken token;
  bool digits = hex.size() == 2 * token.bytes_.size();
  for (const char c : hex) digits = digits && absl::ascii_isxdigit(static_cast<unsigned char>(c));
  if (!digits) return absl::InvalidArgumentError("a job's token has 32 hexadecimal digits");
  const std::string bytes = absl::HexStringToBytes(hex);
  std::memcpy(token.bytes_.data(), bytes.data(), token.bytes_.size());
  return token;
}

absl::StatusOr<JobToken> JobToken::TakeFromEnvironment() {
  const char* const given = std::getenv(kJobTokenVariable);
  if (given == nullptr) return JobToken();
  const absl::StatusOr<JobToken> token = Parse(given);
  unsetenv(kJobTokenVariable);
  if (token.ok()) return token;
  return absl::FailedPreconditionError(absl::StrCat(
      kJobTokenVariable, ": ", std::string(token.status().message()),
      "; give all ranks of the job the same, or unset it: hearth train and hearth submit make one for each start"));
}

std::string JobToken::Hex() const {
  return absl::BytesToHexString({reinterpret_cast<const char*>(bytes_.data()), bytes_.size()});
}

// HMAC-SHA256 with its key set, to be copied for each text; and what XXH3 is keyed with.
struct Seal::Keyed {
  MacContext mac{nullptr, &EVP_MAC_CTX_free};
  std::array<char, kSecretBytes> secret = {};
};

Seal::Seal(const JobToken& token) : keyed_(new Keyed) {
  const std::unique_ptr<EVP_MAC, decltype(&EVP_MAC_free)> hmac(EVP_MAC_fetch(nullptr, "HMAC", nullptr), &EVP_MAC_free);
  HEARTH_CHECK(hmac != nullptr, "OpenSSL has no HMAC");
  keyed_->mac.reset(EVP_MAC_CTX_new(hmac.get()));
  char digest[] = "SHA256";
  const OSSL_PARAM parameters[] = {OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
                                   OSSL_PARAM_construct_end()};
  HEARTH_CHECK(keyed_->mac != nullptr &&
                   EVP_MAC_init(keyed_->mac.get(), token.bytes().data(), token.bytes().size(), parameters) == 1,
               "OpenSSL has no HMAC-SHA256");
  SecretText text;
  for (size_t at = 0; at < kSecretBytes; at += sizeof(SealTag), ++text.number) {
    const SealTag part = Mac(AsBytes(text));
    std::memcpy(keyed_->secret.data() + at, part.data(), sizeof(part));
  }
}

Seal::~Seal() = default;

// The first half of HMAC-SHA256.
SealTag Seal::Mac(absl::Span<const char> text) const {
  unsigned char digest[kSha256Bytes];
  size_t bytes = 0;
  const MacContext mac(EVP_MAC_CTX_dup(keyed_->mac.get()), &EVP_MAC_CTX_free);
  HEARTH_CHECK(mac != nullptr &&
                   EVP_MAC_update(mac.get(), reinterpret_cast<const unsigned char*>(text.data()), text.size()) == 1 &&
                   EVP_MAC_final(mac.get(), digest, &bytes, sizeof(digest)) == 1 && bytes == sizeof(digest),
               "HMAC-SHA256 failed");
  SealTag tag;
  std::memcpy(tag.data(), digest, sizeof(tag));
  return tag;
}

SealTag Seal::MacOfHeader(Address from, Address to, const char* header) const {
  char text[sizeof(Header) + sizeof(Way)];
  std::memcpy(text, header, sizeof(Header));
  std::memset(text + offsetof(Header, tag), 0, sizeof(SealTag));
  const Way way = {from.rank, from.port, to.rank, to.port};
  std::memcpy(text + sizeof(Header), &way, sizeof(way));
  return Mac(text);
}

void Seal::Put(Address from, Address to, Bytes* message) const {
  HEARTH_CHECK(message->size() >= sizeof(Header), "bytes: ", message->size());
  const uint64_t hash = HashOf(message->span().subspan(sizeof(Header)));
  std::memcpy(message->data() + offsetof(Header, body_hash), &hash, sizeof(hash));
  const SealTag tag = MacOfHeader(from, to, message->data());
  std::memcpy(message->data() + offsetof(Header, tag), tag.data(), sizeof(tag));
}

absl::Status Seal::Check(Address from, Address to, absl::Span<const char> message) const {
  if (message.size() < sizeof(Header)) return Refused(absl::StrCat(message.size(), " bytes hold no header"));
  const SealTag tag = MacOfHeader(from, to, message.data());
  if (CRYPTO_memcmp(tag.data(), message.data() + offsetof(Header, tag), sizeof(tag)) != 0) {
    return Refused("its tag is not of this job's token");
  }
  Header header;  // a rank's of this job: what it says was meant so
  std::memcpy(static_cast<void*>(&header), message.data(), sizeof(header));
  const absl::Span<const char> body = message.subspan(sizeof(Header));
  if (header.body_bytes != body.size()) {
    return Refused(absl::StrCat("its header announces ", header.body_bytes, " bytes, received ", body.size()));
  }
  if (header.body_hash != HashOf(body)) return Refused("its body is not what was sent");
  return absl::OkStatus();
}

uint64_t Seal::HashOf(absl::Span<const char> bytes) const {
  return XXH3_64bits_withSecret(bytes.data(), bytes.size(), keyed_->secret.data(), keyed_->secret.size());
}

SealTag Seal::TagOfBuffer(int from_rank, int to_rank, uint64_t number, uint64_t bytes, uint64_t hash) const {
  BufferText text;
  text.number = number;
  text.bytes = bytes;
  text.hash = hash;
  text.from_rank = from_rank;
  text.to_rank = to_rank;
  return Mac(AsBytes(text));
}

}  // namespace hearth
