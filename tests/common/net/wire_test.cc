#include "common/net/wire.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "common/base/env.h"

namespace hearth {
namespace {

// The arrays of a message, owned.
struct Table {
  uint32_t number = 0;
  uint32_t dim = 0;
  std::vector<uint64_t> signs;
  std::vector<uint32_t> occurrences;
  std::vector<float> values;
  uint32_t count = 0;
  Section section() const { return {number, dim, signs, occurrences, values, count}; }
};

Table RandomTable(Random* random, uint32_t number) {
  Table table;
  table.number = number;
  table.dim = static_cast<uint32_t>(random->Below(9));
  table.count = static_cast<uint32_t>(random->Below(12));
  const uint64_t present = random->Below(8);
  uint64_t sign = 0;
  for (uint32_t i = 0; i < table.count; ++i) {
    sign += 1 + random->Below(1000);
    if (present & 1) table.signs.push_back(sign);
    if (present & 2) table.occurrences.push_back(static_cast<uint32_t>(random->Next()));
    for (uint32_t d = 0; d < table.dim && (present & 4); ++d) {
      table.values.push_back(static_cast<float>(random->Uniform() - 0.5));
    }
  }
  return table;
}

Header RandomHeader(Random* random) {
  Header header;
  header.kind = static_cast<MessageKind>(1 + random->Below(7));
  header.lane = static_cast<uint32_t>(random->Next());
  header.flags = static_cast<uint16_t>(random->Below(2));
  header.step = random->Next();
  header.view = random->Next();
  header.split = static_cast<uint32_t>(random->Next());
  header.n = random->Next();
  header.next_cut = random->Next();
  header.time_s = static_cast<uint32_t>(random->Next());
  return header;
}

TEST(Wire, TellsAPlanHowLongASectionIs) {
  Random random(7);
  for (int round = 0; round < 200; ++round) {
    const Table table = RandomTable(&random, 1);
    const Section section = table.section();
    EXPECT_EQ(
        sizeof(Header) + SectionBytesFor(table.dim, table.count, !table.signs.empty(), !table.occurrences.empty(),
                                         table.values.empty() ? std::nullopt : std::make_optional(Dtype::kFloat32)),
        EncodeMessage(Header(), absl::MakeConstSpan(&section, 1)).size());
  }
}

std::vector<Table> RandomTables(Random* random) {
  std::vector<Table> tables;
  const uint64_t count = random->Below(5);
  for (uint32_t t = 1; t <= count; ++t) tables.push_back(RandomTable(random, t));
  return tables;
}

std::vector<Section> SectionsOf(const std::vector<Table>& tables) {
  std::vector<Section> sections;
  for (const Table& table : tables) sections.push_back(table.section());
  return sections;
}

void ExpectEqual(const Section& got, const Section& want) {
  EXPECT_EQ(got.table, want.table);
  EXPECT_EQ(got.dim, want.dim);
  EXPECT_EQ(got.count, want.count);
  EXPECT_EQ(got.signs, want.signs);
  EXPECT_EQ(got.occurrences, want.occurrences);
  EXPECT_EQ(got.values, want.values);
}

// The layout of wire.h, appended number by number.
std::string SlowEncode(const Header& encoded_header, const std::vector<Table>& tables) {
  std::string bytes(reinterpret_cast<const char*>(&encoded_header), sizeof(Header));
  const auto put = [&](const void* data, size_t size) {
    if (size > 0) bytes.append(static_cast<const char*>(data), size);
    while (bytes.size() % 8 != 0) bytes.push_back('\0');
  };
  for (const Table& table : tables) {
    const uint32_t words[3] = {table.number, table.dim, table.count};
    bytes.append(reinterpret_cast<const char*>(words), sizeof(words));
    bytes.push_back(0);
    bytes.push_back(!table.signs.empty());
    bytes.push_back(!table.occurrences.empty());
    bytes.push_back(!table.values.empty());
    bytes.append(8, '\0');
    put(table.signs.data(), table.signs.size() * 8);
    put(table.occurrences.data(), table.occurrences.size() * 4);
    put(table.values.data(), table.values.size() * 4);
  }
  return bytes;
}

TEST(Wire, MessagesComeBackAsTheyWentAndLieAsDocumented) {
  Random random(1);
  for (int i = 0; i < 500; ++i) {
    const std::vector<Table> tables = RandomTables(&random);
    const Header header = RandomHeader(&random);
    const Bytes bytes = EncodeMessage(header, SectionsOf(tables));
    const auto message = DecodeMessage(bytes.span());
    ASSERT_TRUE(message.ok()) << message.status();
    EXPECT_EQ(message->header.kind, header.kind);
    EXPECT_EQ(message->header.lane, header.lane);
    EXPECT_EQ(message->header.flags, header.flags);
    EXPECT_EQ(message->header.step, header.step);
    EXPECT_EQ(message->header.view, header.view);
    EXPECT_EQ(message->header.split, header.split);
    EXPECT_EQ(message->header.n, header.n);
    EXPECT_EQ(message->header.next_cut, header.next_cut);
    EXPECT_EQ(message->header.time_s, header.time_s);
    ASSERT_EQ(message->sections.size(), tables.size());
    for (size_t t = 0; t < tables.size(); ++t) ExpectEqual(message->sections[t], tables[t].section());
    EXPECT_EQ(std::string(bytes.data(), bytes.size()), SlowEncode(message->header, tables));
  }
}

TEST(Wire, ValuesWrittenInPlaceGiveTheSameBytes) {
  Random random(2);
  for (int i = 0; i < 200; ++i) {
    std::vector<Table> tables = RandomTables(&random);
    for (Table& table : tables) {
      table.values.resize(size_t{table.count} * table.dim, 0.25f);
    }
    const Header header = RandomHeader(&random);
    std::vector<Section> without_values = SectionsOf(tables);
    for (Section& section : without_values) section.values = {};
    std::vector<char*> values;
    Bytes bytes = EncodeMessageInPlace(header, without_values, Dtype::kFloat32, &values);
    ASSERT_EQ(values.size(), tables.size());
    for (size_t t = 0; t < tables.size(); ++t) {
      std::copy(tables[t].values.begin(), tables[t].values.end(), reinterpret_cast<float*>(values[t]));
    }
    const Bytes whole = EncodeMessage(header, SectionsOf(tables));
    EXPECT_EQ(bytes.span(), whole.span());
  }
}

TEST(Wire, ValuesOfSixteenBitsTakeHalfTheBytes) {
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    const std::vector<Table> tables = RandomTables(&random);
    const Header header = RandomHeader(&random);
    std::vector<Section> sections = SectionsOf(tables);
    for (Section& section : sections) section.values = {};
    std::vector<char*> values;
    const Bytes bytes = EncodeMessageInPlace(header, sections, Dtype::kFloat16, &values);
    for (size_t t = 0; t < tables.size(); ++t) {
      for (size_t k = 0; k < size_t{tables[t].count} * tables[t].dim; ++k) {
        reinterpret_cast<uint16_t*>(values[t])[k] = static_cast<uint16_t>(k * 7 + t);
      }
    }
    const auto decoded = DecodeMessage(bytes.span());
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    for (size_t t = 0; t < tables.size(); ++t) {
      const Section& section = decoded->sections[t];
      EXPECT_TRUE(section.values.empty());
      ASSERT_EQ(section.halves.size(), size_t{tables[t].count} * tables[t].dim);
      for (size_t k = 0; k < section.halves.size(); ++k) ASSERT_EQ(section.halves[k], static_cast<uint16_t>(k * 7 + t));
      EXPECT_EQ(section.signs, absl::MakeSpan(tables[t].signs));
    }
    for (size_t length = sizeof(Header); length < bytes.size(); length += 1 + random.Below(60)) {
      Bytes part(length);
      std::copy_n(bytes.data(), length, part.data());
      EXPECT_TRUE(absl::IsInternal(DecodeMessage(part.span()).status()));
    }
  }
}

TEST(Wire, EveryTruncationIsFound) {
  Random random(4);
  for (int i = 0; i < 20; ++i) {
    const Bytes bytes = EncodeMessage(RandomHeader(&random), SectionsOf(RandomTables(&random)));
    for (size_t length = 0; length < bytes.size(); ++length) {
      // In a buffer of exactly this length, so that a sanitizer sees a read beyond it.
      Bytes part(length);
      std::copy_n(bytes.data(), length, part.data());
      EXPECT_TRUE(absl::IsInternal(DecodeMessage(part.span()).status())) << length << " of " << bytes.size();
    }
  }
}

// A decoded message, however damaged, has arrays inside the bytes received, of the sizes that it states.
void ExpectInside(const DecodedMessage& message, const Bytes& bytes) {
  const auto inside = [&](const void* data, size_t size) {
    const char* begin = static_cast<const char*>(data);
    return size == 0 || (begin >= bytes.data() && begin + size <= bytes.data() + bytes.size());
  };
  for (const Section& section : message.sections) {
    EXPECT_TRUE(inside(section.signs.data(), section.signs.size() * 8));
    EXPECT_TRUE(inside(section.occurrences.data(), section.occurrences.size() * 4));
    EXPECT_TRUE(inside(section.values.data(), section.values.size() * 4));
    EXPECT_TRUE(section.signs.empty() || section.signs.size() == section.count);
    EXPECT_TRUE(section.values.empty() || section.values.size() == uint64_t{section.count} * section.dim);
    for (size_t i = 1; i < section.signs.size(); ++i) EXPECT_LT(section.signs[i - 1], section.signs[i]);
  }
}

TEST(Wire, DamagedBodiesNeverReachOutsideWhatWasReceived) {
  Random random(5);
  int refused = 0;
  for (int i = 0; i < 5000; ++i) {
    Bytes bytes = EncodeMessage(RandomHeader(&random), SectionsOf(RandomTables(&random)));
    if (bytes.size() == sizeof(Header)) continue;
    for (uint64_t flips = 1 + random.Below(4); flips > 0; --flips) {
      const size_t at = sizeof(Header) + random.Below(bytes.size() - sizeof(Header));
      bytes.data()[at] ^= static_cast<char>(1 << random.Below(8));
    }
    const auto message = DecodeMessage(bytes.span());
    refused += !message.ok();
    if (message.ok()) ExpectInside(*message, bytes);
  }
  EXPECT_GT(refused, 100);
}

// A message of one section that is nothing but this header.
Bytes WithSection(const SectionHeader& section) {
  Table table;
  table.number = 1;
  Bytes bytes = EncodeMessage(Header(), {table.section()});  // an empty section; its header is then overwritten
  std::memcpy(bytes.data() + sizeof(Header), &section, sizeof(section));
  return bytes;
}

TEST(Wire, SizesThatOverflowAreRefused) {
  SectionHeader section;
  section.has_values = 1;
  section.count = 1u << 31;
  section.dim = 1u << 31;  // × 4 bytes = 2^64
  EXPECT_TRUE(absl::IsInternal(DecodeMessage(WithSection(section).span()).status()));
  section.count = 0xffffffff;
  section.dim = 0xffffffff;
  EXPECT_TRUE(absl::IsInternal(DecodeMessage(WithSection(section).span()).status()));
  section = SectionHeader();
  section.has_signs = 1;
  section.count = 1;
  EXPECT_TRUE(absl::IsInternal(DecodeMessage(WithSection(section).span()).status()));
}

TEST(Wire, UnknownTypesAndSignsOutOfOrderAreRefused) {
  SectionHeader section;
  section.dtype = static_cast<Dtype>(2);
  EXPECT_TRUE(absl::IsInternal(DecodeMessage(WithSection(section).span()).status()));
  section.dtype = Dtype::kFloat16;
  EXPECT_TRUE(DecodeMessage(WithSection(section).span()).ok());
  section.dtype = Dtype::kFloat32;
  EXPECT_TRUE(DecodeMessage(WithSection(section).span()).ok());
  Table table;
  table.signs = {5, 5};
  table.count = 2;
  EXPECT_TRUE(absl::IsInternal(DecodeMessage(EncodeMessage(Header(), {table.section()}).span()).status()));
  table.signs = {6, 5};
  EXPECT_TRUE(absl::IsInternal(DecodeMessage(EncodeMessage(Header(), {table.section()}).span()).status()));
}

TEST(Wire, OpaqueBodiesComeBackAndAreNotSections) {
  for (const std::string& body : {std::string(), std::string("x"), std::string(1000, 'y')}) {
    Header header;
    header.kind = MessageKind::kControl;
    header.step = 9;
    const Bytes bytes = EncodeOpaque(header, body);
    const auto decoded = DecodeHeader(bytes.span());
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->step, 9u);
    const absl::Span<const char> got = OpaqueBody(bytes.span());
    EXPECT_EQ(std::string(got.begin(), got.end()), body);
    EXPECT_TRUE(absl::IsInternal(DecodeMessage(bytes.span()).status()));
    if (!body.empty()) {
      EXPECT_TRUE(absl::IsInternal(DecodeHeader(bytes.span().subspan(0, bytes.size() - 1)).status()));
    }
  }
}

}  // namespace
}  // namespace hearth
