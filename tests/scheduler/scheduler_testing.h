// Small things that the scheduler's tests share.
#pragma once

#include <gtest/gtest.h>
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
