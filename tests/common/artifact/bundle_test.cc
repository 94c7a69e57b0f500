#include "common/artifact/bundle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace {
bool noting = false;
std::vector<std::string> synced;  // paths as they were then
}  // namespace

// Every sync of this program, so that a test sees what was on the disk when a rename made it visible.
extern "C" int fsync(int fd) {
  if (noting) {
    std::error_code error;
    synced.push_back(std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd), error).string());
  }
  return static_cast<int>(syscall(SYS_fsync, fd));
}

namespace hearth {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;

TEST(PublishFolder, SyncsEveryFileAndEveryFolderBeforeTheRename) {
  const std::string root = JoinPath(testing::TempDir(), absl::StrCat("bundle_test-", getpid()));
  ASSERT_TRUE(RemoveTree(root).ok());
  ASSERT_TRUE(MakeDirectories(root).ok());
  const std::string out = JoinPath(root, "new/deep/bundle");
  std::string aside;
  noting = true;
  const absl::Status status = PublishFolder(out, [&](const std::string& folder) -> absl::Status {
    aside = folder;
    HEARTH_RETURN_IF_ERROR(MakeDirectories(JoinPath(folder, "triton/model/7")));
    HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(folder, "triton/model/7/model.onnx"), "graph"));
    return DescribeBundle(folder).status();
  });
  noting = false;
  ASSERT_TRUE(status.ok()) << status;
  for (const char* name : {"/triton/model/7/model.onnx", "/triton/model/7", "/triton/model", "/triton", ""}) {
    EXPECT_THAT(synced, Contains(aside + name));
  }
  for (const char* name : {"/new/deep", "/new", ""}) EXPECT_THAT(synced, Contains(root + name));
  EXPECT_THAT(ListDirectory(JoinPath(root, "new/deep")).value(), ElementsAre("bundle"));
  ASSERT_TRUE(RemoveTree(root).ok());
}

}  // namespace
}  // namespace hearth
