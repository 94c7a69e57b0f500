#include "common/net/wire.h"

#include <cstring>

#include "common/base/status.h"

namespace hearth {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire's numbers are this machine's");

constexpr size_t kAlignment = 8;

constexpr uint64_t PaddedBytes(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool CarriesSections(MessageKind kind) { return kind != MessageKind::kControl && kind != MessageKind::kEvaluation; }

// What one section takes after its header.
struct SectionBytes {
  uint64_t signs = 0;
  uint64_t occurrences = 0;
  uint64_t values = 0;
  uint64_t Padded() const { return signs + PaddedBytes(occurrences) + PaddedBytes(values); }
};

// Writes into memory that is large enough, with zeros between what is not a multiple of eight.
class Writer {
 public:
  explicit Writer(char* at) : at_(at) {}
  void Put(const void* data, size_t bytes) {
    if (bytes > 0) std::memcpy(at_, data, bytes);
    Skip(bytes);
  }
  // Leaves room for `bytes`; returns where they go.
  char* Skip(size_t bytes) {
    char* const start = at_;
    const size_t padded = PaddedBytes(bytes);
    std::memset(at_ + bytes, 0, padded - bytes);
    at_ += padded;
    return start;
  }

 private:
  char* at_;
};

uint64_t BytesOf(Dtype dtype) { return dtype == Dtype::kFloat16 ? sizeof(uint16_t) : sizeof(float); }

SectionBytes BytesToWrite(const Section& section, Dtype dtype, bool room_for_values) {
  HEARTH_CHECK(section.signs.empty() || section.signs.size() == section.count, "table ", section.table);
  HEARTH_CHECK(section.occurrences.empty() || section.occurrences.size() == section.count, "table ", section.table);
  const uint64_t values = uint64_t{section.count} * section.dim;
  HEARTH_CHECK(section.values.empty() || section.values.size() == values, "table ", section.table);
  SectionBytes bytes;
  bytes.signs = section.signs.size() * sizeof(uint64_t);
  bytes.occurrences = section.occurrences.size() * sizeof(uint32_t);
  bytes.values = (room_for_values ? values : section.values.size()) * BytesOf(dtype);
  return bytes;
}

void PutHeader(Header header, size_t sections, size_t body_bytes, Writer* writer) {
  HEARTH_CHECK(sections <= UINT16_MAX);
  header.magic = kWireMagic;
  header.version = kWireVersion;
  header.sections = static_cast<uint16_t>(sections);
  header.body_bytes = body_bytes;
  header.body_hash = 0;
  header.tag[0] = header.tag[1] = 0;
  writer->Put(&header, sizeof(header));
}

// values_out null: the sections' own values are copied.
Bytes Encode(const Header& header, absl::Span<const Section> sections, Dtype dtype, std::vector<char*>* values_out) {
  HEARTH_CHECK(CarriesSections(header.kind), "kind ", static_cast<int>(header.kind));
  const bool in_place = values_out != nullptr;
  uint64_t body_bytes = 0;
  for (const Section& section : sections) {
    body_bytes += sizeof(SectionHeader) + BytesToWrite(section, dtype, in_place).Padded();
  }
  Bytes message(sizeof(Header) + body_bytes);
  Writer writer(message.data());
  PutHeader(header, sections.size(), body_bytes, &writer);
  if (in_place) values_out->clear();
  for (const Section& section : sections) {
    const SectionBytes bytes = BytesToWrite(section, dtype, in_place);
    SectionHeader section_header;
    section_header.table = section.table;
    section_header.dim = section.dim;
    section_header.count = section.count;
    section_header.dtype = dtype;
    section_header.has_signs = bytes.signs > 0;
    section_header.has_occurrences = bytes.occurrences > 0;
    section_header.has_values = bytes.values > 0;
    writer.Put(&section_header, sizeof(section_header));
    writer.Put(section.signs.data(), bytes.signs);
    writer.Put(section.occurrences.data(), bytes.occurrences);
    if (in_place) {
      values_out->push_back(writer.Skip(bytes.values));
    } else {
      writer.Put(section.values.data(), bytes.values);
    }
  }
  return message;
}

absl::Status Broken(absl::string_view cause) { return absl::InternalError(absl::StrCat("message: ", cause)); }

// Takes arrays off the front of what was received. Sizes are compared in 128 bits: count × dim × 4 may not fit 64.
class Reader {
 public:
  explicit Reader(absl::Span<const char> left) : left_(left) {}

  template <typename T>
  bool Take(bool present, uint64_t count, uint64_t dim, absl::Span<const T>* out) {
    if (!present) return true;
    const unsigned __int128 bytes = static_cast<unsigned __int128>(count) * dim * sizeof(T);
    if (bytes > left_.size()) return false;
    const uint64_t padded = PaddedBytes(static_cast<uint64_t>(bytes));
    if (padded > left_.size()) return false;
    *out = absl::MakeSpan(reinterpret_cast<const T*>(left_.data()), static_cast<size_t>(bytes) / sizeof(T));
    left_.remove_prefix(padded);
    return true;
  }
  size_t left() const { return left_.size(); }

 private:
  absl::Span<const char> left_;
};

absl::StatusOr<Section> ReadSection(Reader* reader) {
  absl::Span<const SectionHeader> raw;
  if (!reader->Take(true, 1, 1, &raw)) return Broken("ends inside the header of a section");
  const SectionHeader& header = raw[0];
  if (header.dtype > Dtype::kFloat16) {
    return Broken(absl::StrCat("table ", header.table, ": dtype ", static_cast<int>(header.dtype), " is not known"));
  }
  if (header.has_signs > 1 || header.has_occurrences > 1 || header.has_values > 1 || header.reserved != 0) {
    return Broken(absl::StrCat("table ", header.table, ": flags of a section are neither 0 nor 1"));
  }
  Section section;
  section.table = header.table;
  section.dim = header.dim;
  section.count = header.count;
  if (!reader->Take(header.has_signs, header.count, 1, &section.signs) ||
      !reader->Take(header.has_occurrences, header.count, 1, &section.occurrences) ||
      !(header.dtype == Dtype::kFloat16 ? reader->Take(header.has_values, header.count, header.dim, &section.halves)
                                        : reader->Take(header.has_values, header.count, header.dim, &section.values))) {
    return Broken(absl::StrCat("table ", header.table, ": ", header.count, " rows of ", header.dim,
                               " are longer than what was received"));
  }
  for (size_t i = 1; i < section.signs.size(); ++i) {
    if (section.signs[i - 1] >= section.signs[i]) {
      return Broken(absl::StrCat("table ", header.table, ": signs do not ascend at row ", i));
    }
  }
  return section;
}

}  // namespace

uint64_t SectionBytesFor(uint32_t dim, uint64_t count, bool signs, bool occurrences, std::optional<Dtype> values) {
  SectionBytes bytes;
  if (signs) bytes.signs = count * sizeof(uint64_t);
  if (occurrences) bytes.occurrences = count * sizeof(uint32_t);
  if (values.has_value()) bytes.values = count * dim * BytesOf(*values);
  return sizeof(SectionHeader) + bytes.Padded();
}

Bytes EncodeMessage(Header header, absl::Span<const Section> sections) {
  return Encode(header, sections, Dtype::kFloat32, nullptr);
}

Bytes EncodeMessageInPlace(Header header, absl::Span<const Section> sections, Dtype dtype,
                           std::vector<char*>* values_out) {
  return Encode(header, sections, dtype, values_out);
}

absl::StatusOr<Header> DecodeHeader(absl::Span<const char> bytes) {
  if (bytes.size() < sizeof(Header)) {
    return Broken(absl::StrCat(bytes.size(), " bytes are shorter than a header of ", sizeof(Header)));
  }
  Header header;
  std::memcpy(static_cast<void*>(&header), bytes.data(), sizeof(header));
  if (header.magic != kWireMagic) return Broken("magic is not Hearth's");
  if (header.version != kWireVersion) {
    return Broken(
        absl::StrCat("version ", header.version, " is not ", kWireVersion, "; start all ranks from one build"));
  }
  if (header.kind < MessageKind::kPull || header.kind > MessageKind::kEvaluation) {
    return Broken(absl::StrCat("kind ", static_cast<int>(header.kind), " is not known"));
  }
  if (header.body_bytes != bytes.size() - sizeof(Header)) {
    return Broken(
        absl::StrCat("header announces ", header.body_bytes, " bytes, received ", bytes.size() - sizeof(Header)));
  }
  return header;
}

absl::StatusOr<DecodedMessage> DecodeMessage(absl::Span<const char> bytes) {
  DecodedMessage message;
  HEARTH_ASSIGN_OR_RETURN(message.header, DecodeHeader(bytes));
  if (!CarriesSections(message.header.kind)) return Broken("a control or evaluation message has no sections");
  if (reinterpret_cast<uintptr_t>(bytes.data()) % kAlignment != 0) return Broken("bytes are not aligned to 8");
  Reader reader(bytes.subspan(sizeof(Header)));
  if (message.header.sections > reader.left() / sizeof(SectionHeader)) {
    return Broken(absl::StrCat(message.header.sections, " sections do not fit ", reader.left(), " bytes"));
  }
  message.sections.reserve(message.header.sections);
  for (int i = 0; i < message.header.sections; ++i) {
    HEARTH_ASSIGN_OR_RETURN(const Section section, ReadSection(&reader));
    message.sections.push_back(section);
  }
  if (reader.left() != 0) return Broken(absl::StrCat(reader.left(), " bytes are left after the last section"));
  return message;
}

Bytes EncodeOpaque(Header header, absl::Span<const char> body) {
  Bytes message(sizeof(Header) + body.size());
  Writer writer(message.data());
  PutHeader(header, 0, body.size(), &writer);
  if (!body.empty()) std::memcpy(message.data() + sizeof(Header), body.data(), body.size());
  return message;
}

absl::Span<const char> OpaqueBody(absl::Span<const char> bytes) { return bytes.subspan(sizeof(Header)); }

}  // namespace hearth
