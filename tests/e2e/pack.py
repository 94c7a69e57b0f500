#!/usr/bin/env python3
"""scripts/pack: what it makes runs on a bare Linux, an empty root that has glibc, a shell and readlink and no network,
to the hash of the build itself. Needs root, for chroot and mounts.

Usage: pack.py --bin DIR [--torch FOLDER] CASE    (FOLDER: the node's torch package, of a build that leaves it out)
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import e2e
from e2e import SPEC, Bench, check, check_equal, check_finished

REPO = pathlib.Path(__file__).resolve().parents[2]
RECORDS = 3000
GLIBC = ("libc.so.6", "libm.so.6", "libmvec.so.1", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libresolv.so.2",
         "libutil.so.1")
MOUNTS = """set -e
ip link set lo up 2>/dev/null || true
mount --rbind /dev "$1/dev"; mount -t proc proc "$1/proc"; mount -t sysfs sysfs "$1/sys"
[ -z "$3" ] || { mount --rbind "$3" "$1/node/torch"; mount --rbind /usr/local/cuda/ "$1/usr/local/cuda"; }
exec chroot "$1" /bin/sh -c "$2"
"""


def command(*words, expect=0):
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    check_equal(done.returncode, expect, f"{' '.join(map(str, words))}\n{done.stdout}\nexit code")
    return done.stdout


class PackBench(Bench):
    torch = None  # the node's torch package

    @property
    def preset(self):
        return pathlib.Path(self.hearth).parents[1].name

    def pack(self, out, *options, **more):
        if self.torch:
            options += ("--without-torch",)
        return command(REPO / "scripts/pack", self.preset, out, *options, **more)


class Root:
    """An empty root folder, and commands that run in it."""

    def __init__(self, folder, torch):
        self.folder, self.torch = pathlib.Path(folder), torch
        for name in ("bin", "dev", "proc", "sys", "tmp", "lib64", "lib/x86_64-linux-gnu", "node/torch",
                     "usr/local/cuda"):
            (self.folder / name).mkdir(parents=True)
        loader = pathlib.Path("/lib64/ld-linux-x86-64.so.2")
        shutil.copy(loader.resolve(), self.folder / "lib64" / loader.name)
        cache = command("/sbin/ldconfig", "-p")
        known = dict(re.findall(r"^\s*(\S+) \(libc6,x86-64[^)]*\) => (\S+)$", cache, re.MULTILINE))
        for name in GLIBC:
            shutil.copy(known[name], self.folder / "lib/x86_64-linux-gnu" / name)
        for program, path in (("sh", "/bin/sh"), ("readlink", "/bin/readlink")):
            shutil.copy(os.path.realpath(path), self.folder / "bin" / program)

    def run(self, text, expect=0, torch=True):
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp"}
        torch = self.torch if torch else None
        if torch:
            environment["HEARTH_TORCH_LIB"] = "/node/torch/torch/lib"
        done = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "/bin/sh", "-c",
                               MOUNTS, "sh", self.folder, text, torch or ""],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=240, env=environment)
        check_equal(done.returncode, expect, f"in the root: {text}\n{done.stdout}\nexit code")
        return done.stdout


def an_empty_root_trains_to_the_builds_hash(bench):
    bench.generate(records=RECORDS)
    own = bench.train("own", ps=1, worker=2)
    archive = bench.root / "pack.tar.gz"
    print("  " + bench.pack(archive, "--no-tests").strip(), flush=True)
    root = Root(bench.root / "root", bench.torch and pathlib.Path(bench.torch).parent)
    (root.folder / "opt").mkdir()
    command("tar", "-C", root.folder / "opt", "-xzf", archive)
    (root.folder / "tmp/spec.txtpb").write_text(SPEC)
    root.run(f"/opt/pack/bin/hearth generate /tmp/spec.txtpb --out /tmp/data --records {RECORDS}")
    output = root.run("/opt/pack/bin/hearth train /tmp/data/job.txtpb --out /tmp/run --np-ps 1 --np-worker 2 "
                      "--max-restarts 0")
    run = json.loads((root.folder / "tmp/run/run.json").read_text())
    check_finished(run, RECORDS)
    check_equal(run["model_hash"], own["model_hash"], f"{output}\nhash of the packed programs against the build's")
    root.run("cd /tmp && /opt/pack/bin/hearth verify run")
    if bench.torch:
        text = root.run("/opt/pack/bin/hearth train /tmp/data/job.txtpb --out /tmp/none", expect=78, torch=False)
        check("HEARTH_TORCH_LIB" in text and len(text.splitlines()) == 1, f"not one line with the remedy: {text}")
        root.run("/opt/pack/bin/hearth inspect /tmp/run", torch=False)


def bad_arguments_are_told_with_their_exit_code(bench):
    folder = bench.root
    tool = REPO / "scripts/pack"
    command(tool, expect=64)
    command(tool, "nothing", folder / "out", expect=64)
    command(tool, bench.preset, folder / "no/such/folder", expect=64)
    (folder / "full").mkdir()
    (folder / "full/file").touch()
    bench.pack(folder / "full", expect=64)
    copy = folder / "repo"  # a checkout in which nothing is built
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(tool, copy / "scripts/pack")
    shutil.copy(REPO / "CMakePresets.json", copy)
    text = command(copy / "scripts/pack", "release", folder / "out", expect=78)
    check("scripts/build release" in text, text)
    text = command(REPO / "scripts/gpu_check", expect=64)
    check("scripts/pack" in text, text)
    check_equal(sorted(path.name for path in folder.iterdir()), ["full", "repo"], "left behind")


CASES = (an_empty_root_trains_to_the_builds_hash, bad_arguments_are_told_with_their_exit_code)


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--torch")
    arguments, sys.argv[1:] = parser.parse_known_args()
    PackBench.torch = arguments.torch
    e2e.main(CASES, "hearth-pack-", PackBench)


if __name__ == "__main__":
    main()
