#include "common/net/seal.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "common/base/env.h"
#include "common/net/wire.h"

namespace hearth {
namespace {

constexpr Address kFrom = {3, 4}, kTo = {1, 2};

JobToken TokenOf(const std::string& hex) { return *JobToken::Parse(hex); }
JobToken OneToken() { return TokenOf("000102030405060708090a0b0c0d0e0f"); }

Bytes MessageOf(const std::string& body) {
  Header header;
  header.kind = MessageKind::kControl;
  header.step = 43;
  return EncodeOpaque(header, body);
}

Bytes SealedMessage(const Seal& seal, const std::string& body) {
  Bytes message = MessageOf(body);
  seal.Put(kFrom, kTo, &message);
  return message;
}

TEST(Seal, LetsThroughWhatWasSealedWithTheSameToken) {
  const Seal sender(OneToken()), receiver(OneToken());
  for (size_t bytes : {0, 1, 7, 8, 240, 241, 100'000}) {
    const Bytes message = SealedMessage(sender, std::string(bytes, 'x'));
    EXPECT_TRUE(receiver.Check(kFrom, kTo, message.span()).ok()) << bytes;
    EXPECT_EQ(DecodeHeader(message.span())->step, 43u);
  }
}

TEST(Seal, RefusesAnotherTokenAndNoToken) {
  const Seal receiver(OneToken());
  JobToken other = TokenOf("000102030405060708090a0b0c0d0e0e");  // one bit
  EXPECT_TRUE(absl::IsInternal(receiver.Check(kFrom, kTo, SealedMessage(Seal(other), "body").span())));
  EXPECT_TRUE(absl::IsInternal(receiver.Check(kFrom, kTo, SealedMessage(Seal(JobToken()), "body").span())));
  EXPECT_TRUE(absl::IsInternal(receiver.Check(kFrom, kTo, MessageOf("body").span())));
}

TEST(Seal, RefusesEveryFlippedBitOfAHeaderAndOfABody) {
  const Seal seal(OneToken());
  Bytes message = SealedMessage(seal, "what the ranks say to each other");
  for (size_t bit = 0; bit < message.size() * 8; ++bit) {
    message.data()[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    EXPECT_TRUE(absl::IsInternal(seal.Check(kFrom, kTo, message.span()))) << "bit " << bit;
    message.data()[bit / 8] ^= static_cast<char>(1 << (bit % 8));
  }
  EXPECT_TRUE(seal.Check(kFrom, kTo, message.span()).ok());
}

TEST(Seal, RefusesEveryTruncation) {
  const Seal seal(OneToken());
  const Bytes message = SealedMessage(seal, "what the ranks say to each other");
  for (size_t length = 0; length < message.size(); ++length) {
    Bytes part(length);  // of exactly this length, so that a sanitizer sees a read beyond it
    std::copy_n(message.data(), length, part.data());
    EXPECT_TRUE(absl::IsInternal(seal.Check(kFrom, kTo, part.span()))) << length;
  }
}

TEST(Seal, RefusesAMessageOnAnotherWay) {
  const Seal seal(OneToken());
  const Bytes message = SealedMessage(seal, "body");
  for (const auto& [from, to] :
       {std::pair<Address, Address>{{2, 4}, kTo}, {{3, 5}, kTo}, {kFrom, {0, 2}}, {kFrom, {1, 1}}, {kTo, kFrom}}) {
    EXPECT_TRUE(absl::IsInternal(seal.Check(from, to, message.span()))) << from.rank << " " << to.port;
  }
}

// Of a stranger's message nothing is looked at, and a body costs nothing, before the tag is right.
TEST(Seal, ChecksTheTagBeforeAnythingElse) {
  const Seal seal(OneToken());
  Bytes message = SealedMessage(Seal(JobToken()), "body");
  uint64_t bytes = uint64_t{1} << 60;
  std::memcpy(message.data() + offsetof(Header, body_bytes), &bytes, sizeof(bytes));
  std::memset(message.data(), 0xff, 8);  // magic, version and kind
  EXPECT_TRUE(absl::StrContains(seal.Check(kFrom, kTo, message.span()).message(), "tag"));
}

TEST(Seal, BuffersOfAnExchangeHaveTagsOfTheirOwn) {
  const Seal seal(OneToken());
  const Seal other{JobToken()};
  const std::string bytes = "a slice of gradients";
  const SealTag tag = seal.TagOfBuffer(0, 1, 7, bytes.size(), seal.HashOf(bytes));
  EXPECT_EQ(seal.TagOfBuffer(0, 1, 7, bytes.size(), seal.HashOf(bytes)), tag);
  std::string altered = bytes;
  altered[3] ^= 4;
  const std::set<SealTag> others = {
      tag,
      seal.TagOfBuffer(0, 1, 7, bytes.size(), seal.HashOf(altered)),
      seal.TagOfBuffer(0, 1, 8, bytes.size(), seal.HashOf(bytes)),
      seal.TagOfBuffer(1, 0, 7, bytes.size(), seal.HashOf(bytes)),
      seal.TagOfBuffer(0, 2, 7, bytes.size(), seal.HashOf(bytes)),
      seal.TagOfBuffer(0, 1, 7, bytes.size() - 1, seal.HashOf(bytes)),
      other.TagOfBuffer(0, 1, 7, bytes.size(), other.HashOf(bytes)),
  };
  EXPECT_EQ(others.size(), 7u);
}

// The example of docs/FORMATS.md.
TEST(Seal, LiesAsTheFormatsPageShows) {
  Header header;
  header.lane = 1;
  header.step = 43;
  header.view = 42;
  const std::vector<uint64_t> signs = {0x0020000000003039, 0x002000000000303a};
  const std::vector<uint32_t> occurrences = {3, 1};
  Section section{2, 3, signs, occurrences, {}, 2};
  Bytes message = EncodeMessage(header, {&section, 1});
  const Seal seal(OneToken());
  seal.Put({3, 3}, {1, 2}, &message);
  EXPECT_EQ(absl::BytesToHexString({message.data() + 56, 32}),
            "3000000000000000"
            "9d2ceda27b2a009c"
            "fd87fa1a4bb0aa9ebbb9c0050574aa3f");
}

TEST(JobToken, IsRandomAndComesBackFromItsDigits) {
  std::set<std::string> seen;
  for (int i = 0; i < 100; ++i) {
    const std::string hex = JobToken::Random()->Hex();
    EXPECT_EQ(hex.size(), 32u);
    EXPECT_EQ(JobToken::Parse(hex)->Hex(), hex);
    seen.insert(hex);
  }
  EXPECT_EQ(seen.size(), 100u);
}

TEST(JobToken, IsTakenOutOfTheEnvironment) {
  setenv(kJobTokenVariable, OneToken().Hex().c_str(), 1);
  EXPECT_EQ(JobToken::TakeFromEnvironment()->Hex(), OneToken().Hex());
  EXPECT_EQ(std::getenv(kJobTokenVariable), nullptr);
  EXPECT_EQ(JobToken::TakeFromEnvironment()->Hex(), std::string(32, '0')) << "ranks that were started by hand";
}

TEST(JobToken, ThatIsNoneIsRefusedAndNotRepeated) {
  for (const char* text : {"", "0001", "000102030405060708090a0b0c0d0e0g", "000102030405060708090a0b0c0d0e0f0"}) {
    setenv(kJobTokenVariable, text, 1);
    const absl::Status status = JobToken::TakeFromEnvironment().status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << text;
    EXPECT_TRUE(absl::StrContains(status.message(), kJobTokenVariable)) << status;
    EXPECT_TRUE(*text == '\0' || !absl::StrContains(status.message(), text)) << status;
  }
}

}  // namespace
}  // namespace hearth
