#include "tests/embedding/map_store.h"

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr char kFileName[] = "map";
using Map = std::map<KvKey, std::string>;

template <typename T>
void AppendNumber(T number, std::string* out) {
  out->append(reinterpret_cast<const char*>(&number), sizeof(number));
}

template <typename T>
bool TakeNumber(absl::string_view* in, T* number) {
  if (in->size() < sizeof(T)) return false;
  std::memcpy(number, in->data(), sizeof(T));
  in->remove_prefix(sizeof(T));
  return true;
}

class MapStore final : public KvStore {
 public:
  explicit MapStore(Map map) : map_(std::move(map)) {}

  absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) override {
    std::lock_guard<std::mutex> lock(mutex_);
    values->Reset(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto it = map_.find(keys[i]);
      if (it != map_.end()) values->Set(i, it->second);
    }
    return absl::OkStatus();
  }

  absl::Status Write(absl::Span<const KvWrite> writes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const KvWrite& write : writes) {
      if (write.remove) {
        map_.erase(write.key);
      } else {
        map_[write.key] = std::string(write.value);
      }
    }
    return absl::OkStatus();
  }

  absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) override {
    if (!(first < last)) return absl::OkStatus();
    const Map range = [&] {  // `visit` may write
      std::lock_guard<std::mutex> lock(mutex_);
      return Map(map_.lower_bound(first), map_.lower_bound(last));
    }();
    for (const auto& [key, value] : range) {
      if (!visit(key, value)) break;
    }
    return absl::OkStatus();
  }

  absl::Status Checkpoint(const std::string& path) override {
    if (PathExists(path)) return absl::FailedPreconditionError(absl::StrCat(path, ": exists already; remove it first"));
    std::string bytes;
    for (const auto& [key, value] : map_) {
      AppendNumber(key.shard, &bytes);
      AppendNumber(key.sign, &bytes);
      AppendNumber(uint64_t{value.size()}, &bytes);
      bytes += value;
    }
    HEARTH_RETURN_IF_ERROR(MakeDirectories(path));
    return WriteFileAtomically(JoinPath(path, kFileName), bytes);
  }

  uint64_t DiskBytes() override { return 0; }

 private:
  std::mutex mutex_;
  Map map_;  // guarded by mutex_
};

}  // namespace

std::unique_ptr<KvStore> MakeMapStore() { return std::make_unique<MapStore>(Map()); }

absl::StatusOr<std::unique_ptr<KvStore>> OpenMapStore(const std::string& path) {
  const std::string file = JoinPath(path, kFileName);
  HEARTH_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(file));
  Map map;
  for (absl::string_view rest = bytes; !rest.empty();) {
    KvKey key;
    uint64_t size = 0;
    if (!TakeNumber(&rest, &key.shard) || !TakeNumber(&rest, &key.sign) || !TakeNumber(&rest, &size) ||
        size > rest.size()) {
      return absl::DataLossError(absl::StrCat(file, ": ends inside a record; restore the file"));
    }
    map[key] = std::string(rest.substr(0, size));
    rest.remove_prefix(size);
  }
  return std::make_unique<MapStore>(std::move(map));
}

}  // namespace hearth
