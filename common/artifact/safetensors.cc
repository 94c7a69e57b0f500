#include "common/artifact/safetensors.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr uint64_t kHeaderBytesMax = 100'000'000;  // the reference implementation's own limit
constexpr const char* kMetadata = "__metadata__";

// Product of a shape and its dtype's width. Nothing: negative, or beyond 63 bits.
bool SizeOf(const std::vector<int64_t>& shape, int64_t width, int64_t* bytes) {
  *bytes = width;
  for (const int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(*bytes, extent, bytes)) return false;
  }
  return true;
}

absl::Status Lost(const std::string& name, absl::string_view fault) {
  return absl::DataLossError(
      absl::StrCat(name, ": not a sound safetensors file: ", fault, "; take another snapshot or copy it again"));
}

// What is wrong with the file's first number, the length of its header; empty: nothing.
std::string HeaderFault(bool has_length, uint64_t length, uint64_t file_bytes) {
  if (!has_length) return "shorter than its header";
  if (length <= kHeaderBytesMax && length <= file_bytes - sizeof(length)) return "";
  return absl::StrCat("a header of ", length, " bytes in a file of ", file_bytes);
}

bool ByName(const NamedTensor& a, const NamedTensor& b) { return a.name < b.name; }

struct Place {
  uint64_t begin = 0;
  uint64_t end = 0;
  const std::string* name = nullptr;
};

// One entry of the header, checked by itself; `data` is everything behind the header. False: *fault says why.
bool ParseTensor(const nlohmann::json& entry, absl::Span<const char> data, NamedTensor* tensor, std::string* fault) {
  const auto dtype = entry.find("dtype");
  const auto shape = entry.find("shape");
  const auto offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string() || shape == entry.end() || !shape->is_array() ||
      offsets == entry.end() || !offsets->is_array() || offsets->size() != 2) {
    *fault = "needs dtype, shape and two data_offsets";
    return false;
  }
  tensor->dtype = dtype->get<std::string>();
  const int64_t width = BytesOfDtype(tensor->dtype);
  if (width == 0) {
    *fault = absl::StrCat("dtype ", tensor->dtype, " is unknown");
    return false;
  }
  for (const nlohmann::json& extent : *shape) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
      *fault = "an extent of the shape is no natural number";
      return false;
    }
    tensor->shape.push_back(static_cast<int64_t>(extent.get<uint64_t>()));
  }
  if (!(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    *fault = "data_offsets are no natural numbers";
    return false;
  }
  const uint64_t begin = (*offsets)[0].get<uint64_t>();
  const uint64_t end = (*offsets)[1].get<uint64_t>();
  int64_t bytes = 0;
  if (begin > end || end > data.size()) {
    *fault = absl::StrCat("data_offsets [", begin, ", ", end, ") leave the file's ", data.size(), " bytes of data");
    return false;
  }
  if (!SizeOf(tensor->shape, width, &bytes) || static_cast<uint64_t>(bytes) != end - begin) {
    *fault = absl::StrCat("shape and dtype do not make the ", end - begin, " bytes of its data_offsets");
    return false;
  }
  tensor->data = data.subspan(begin, end - begin);
  return true;
}

// Data without holes and overlaps, up to the last byte.
bool CheckCoverage(absl::Span<const char> data, const std::vector<NamedTensor>& tensors, std::string* fault) {
  std::vector<Place> places;
  for (const NamedTensor& tensor : tensors) {
    const uint64_t begin = tensor.data.empty() ? 0 : static_cast<uint64_t>(tensor.data.data() - data.data());
    if (!tensor.data.empty()) places.push_back({begin, begin + tensor.data.size(), &tensor.name});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.begin < b.begin; });
  uint64_t covered = 0;
  for (const Place& place : places) {
    if (place.begin != covered) {
      *fault = absl::StrCat("tensor ", *place.name, place.begin < covered ? " overlaps another" : " leaves a hole",
                            " at ", std::min(place.begin, covered));
      return false;
    }
    covered = place.end;
  }
  if (covered != data.size()) *fault = absl::StrCat(data.size() - covered, " bytes behind the last tensor");
  return covered == data.size();
}

}  // namespace

const NamedTensor* SafetensorsFile::Find(absl::string_view name) const {
  const auto found = std::lower_bound(tensors.begin(), tensors.end(), name,
                                      [](const NamedTensor& t, absl::string_view n) { return t.name < n; });
  return found != tensors.end() && found->name == name ? &*found : nullptr;
}

int64_t BytesOfDtype(absl::string_view dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "I8" || dtype == "U8" || dtype == "BOOL") return 1;
  return 0;
}

absl::Status WriteSafetensors(const std::string& path, std::vector<NamedTensor> tensors,
                              const TensorMetadata& metadata) {
  std::sort(tensors.begin(), tensors.end(), ByName);
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  uint64_t end = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const NamedTensor& tensor = tensors[i];
    int64_t bytes = 0;
    if (!SizeOf(tensor.shape, BytesOfDtype(tensor.dtype), &bytes) || static_cast<size_t>(bytes) != tensor.data.size() ||
        tensor.name == kMetadata || (i > 0 && tensors[i - 1].name == tensor.name)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", tensor.name, ": ", tensor.data.size(),
                                                     " bytes of ", tensor.dtype,
                                                     " do not fit its shape, or its name is taken"));
    }
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {end, end + tensor.data.size()}}};
    end += tensor.data.size();
  }
  std::string text = header.dump(-1, ' ', /*ensure_ascii=*/false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  file.reserve(sizeof(length) + text.size() + end);
  file += text;
  for (const NamedTensor& tensor : tensors) file.append(tensor.data.data(), tensor.data.size());
  return WriteFileAtomically(path, file);
}

absl::StatusOr<SafetensorsFile> ReadSafetensors(const std::string& path) {
  // As long as the file is, but not before its beginning says that it may be one: ReadFile's own bound is for other
  // files, and a model may be larger.
  HEARTH_ASSIGN_OR_RETURN(const uint64_t file_bytes, FileBytes(path));
  uint64_t length = 0;
  std::ifstream beginning(path, std::ios::binary);
  const bool has_length = static_cast<bool>(beginning.read(reinterpret_cast<char*>(&length), sizeof(length)));
  if (beginning.bad()) return absl::UnavailableError(absl::StrCat(path, ": cannot be read"));
  if (const std::string fault = HeaderFault(has_length, length, file_bytes); !fault.empty()) return Lost(path, fault);
  HEARTH_ASSIGN_OR_RETURN(std::string bytes, ReadFile(path, file_bytes));
  return ParseSafetensors(std::move(bytes), path);
}

absl::StatusOr<SafetensorsFile> ParseSafetensors(std::string bytes, const std::string& name_for_errors) {
  const auto lost = [&](absl::string_view fault) { return Lost(name_for_errors, fault); };
  SafetensorsFile file;
  file.bytes = std::move(bytes);
  uint64_t length = 0;
  const bool has_length = file.bytes.size() >= sizeof(length);
  if (has_length) std::memcpy(&length, file.bytes.data(), sizeof(length));
  if (const std::string why = HeaderFault(has_length, length, file.bytes.size()); !why.empty()) return lost(why);
  const char* text = file.bytes.data() + sizeof(length);
  const nlohmann::json header = nlohmann::json::parse(text, text + length, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return lost("the header is no JSON object");
  const absl::Span<const char> data(text + length, file.bytes.size() - sizeof(length) - length);
  std::string fault;
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadata) {
      if (!entry.is_object()) return lost("__metadata__ is no object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) return lost("a value of __metadata__ is no string");
        file.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    NamedTensor tensor;
    tensor.name = name;
    if (!entry.is_object() || !ParseTensor(entry, data, &tensor, &fault)) {
      return lost(absl::StrCat("tensor ", name, ": ", fault.empty() ? "no object" : fault));
    }
    file.tensors.push_back(std::move(tensor));
  }
  std::sort(file.tensors.begin(), file.tensors.end(), ByName);
  if (!CheckCoverage(data, file.tensors, &fault)) return lost(fault);
  return file;
}

uint64_t HashTensors(absl::Span<const NamedTensor> tensors) {
  std::vector<const NamedTensor*> ordered;
  for (const NamedTensor& tensor : tensors) ordered.push_back(&tensor);
  std::sort(ordered.begin(), ordered.end(), [](const NamedTensor* a, const NamedTensor* b) { return ByName(*a, *b); });
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  XXH3_64bits_reset(state.get());
  for (const NamedTensor* tensor : ordered) {
    XXH3_64bits_update(state.get(), tensor->name.data(), tensor->name.size());
    XXH3_64bits_update(state.get(), tensor->data.data(), tensor->data.size());
  }
  return XXH3_64bits_digest(state.get());
}

}  // namespace hearth
