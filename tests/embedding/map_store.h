// KvStore over a std::map, for tests: the contract in its plainest form.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "embedding/kv_store.h"

namespace hearth {

// Checkpoint writes one file that OpenMapStore reads back.
std::unique_ptr<KvStore> MakeMapStore();
absl::StatusOr<std::unique_ptr<KvStore>> OpenMapStore(const std::string& path);

}  // namespace hearth
