// Small things that the scheduler's tests share.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace hearth {

// An empty folder of this test's own.
inline std::string MakeTestFolder() {
  spdlog::set_level(spdlog::level::off);  // what these tests provoke is no news
  const testing::TestInfo* const test = testing::UnitTest::GetInstance()->current_test_info();
  const std::string folder = JoinPath(
      testing::TempDir(), absl::StrCat("scheduler-", getpid(), "-", test->test_suite_name(), "-", test->name()));
  HEARTH_CHECK(RemoveTree(folder).ok() && MakeDirectories(folder).ok());
  return folder;
}

// Waits for what another thread does in a folder, asleep until something there has another name.
class FolderWatch {
 public:
  explicit FolderWatch(const std::string& folder) : events_(inotify_init1(IN_CLOEXEC | IN_NONBLOCK)) {
    HEARTH_CHECK(events_ >= 0 && inotify_add_watch(events_, folder.c_str(), IN_CREATE | IN_MOVE | IN_DELETE) >= 0);
  }
  ~FolderWatch() { close(events_); }
  // `done` is asked at once and after each change. Gives up, and fails the test, after a minute without one.
  template <typename Predicate>
  void Until(const Predicate& done) {
    constexpr int kPatienceMs = 60'000;
    while (!done()) {
      pollfd changed = {events_, POLLIN, 0};
      if (poll(&changed, 1, kPatienceMs) != 1) {
        ADD_FAILURE() << "nothing happened for a minute";
        return;
      }
      char events[4096];
      while (read(events_, events, sizeof(events)) > 0) {
      }
    }
  }

 private:
  const int events_;
};

// An exporter of our own making, DIR/hearth-export and DIR/hearth-delta: makes folders with the manifests of a chain.
// hearth-export SNAPSHOT --out OUT/STEP … | hearth-delta SNAPSHOT --out OUT --since STEP. $DIR/fail: ends with the
// code in it; $DIR/die: is killed with its work half done; $DIR/hold: works until that is gone.
inline constexpr char kExporter[] = R"(#!/bin/sh
dir=$(dirname $0)
echo "$@" >> $dir/calls
snapshot=$1 step=$(basename $1) out=$3
[ -e $dir/snapshots/$step ] || exit 66
while [ -e $dir/hold ]; do :; done
[ -e $dir/fail ] && exit $(cat $dir/fail)
if [ "$4" = --since ]; then
  base=$(ls $out | grep -x '[0-9]*' | sort -n | tail -1)
  last=$(ls $out/delta/$base 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -1)
  before=$out/$base
  [ -n "$last" ] && before=$out/delta/$base/$last
  seq=$((${last:-0} + 1))
  to=$out/delta/$base/$seq
  sum=$(cut -c1-64 $before/manifest.json.sha256)
  text="{\"version\": $step, \"base_version\": $base, \"delta\": {\"seq\": $seq, \"from_step\": $5, \"previous_sha256\": \"$sum\"}}"
else
  to=$out
  text="{\"version\": $step}"
fi
mkdir -p $to.partial-$$
[ -e $dir/die ] && rm $dir/die && kill -9 $$
echo "$text" > $to.partial-$$/manifest.json
(cd $to.partial-$$ && sha256sum manifest.json > manifest.json.sha256)
mv -T $to.partial-$$ $to
)";
inline void WriteExporter(const std::string& dir) {
  for (const char* name : {"hearth-export", "hearth-delta"}) {
    const std::string path = JoinPath(dir, name);
    HEARTH_CHECK(WriteFileAtomically(path, kExporter).ok() && chmod(path.c_str(), 0755) == 0);
  }
}

}  // namespace hearth
