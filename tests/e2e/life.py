#!/usr/bin/env python3
"""A run's long life: it loses ranks and goes on, goes back and forks, moves to another place, and tells of all that.
As e2e.py, whose helpers it uses.

Usage: life.py --bin DIR CASE     (or: all)
"""
import json
import os
import pathlib
import shutil
import signal

from e2e import LONG, check, check_equal, check_finished, main

CHANGE = ["training.clip_norm=5"]
# All of it: what waits too long is left out else.
PUBLISHING = ["export.delta_every_steps=12", "export.waiting_max=100"]


def eras(bench, name):
    return json.loads(bench.run("history", bench.root / name, "--json"))["eras"]


def each_new_snapshot_begins_the_count_of_restarts_anew(bench):
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=1, worker=2)
    process = bench.start("killed", "--max-restarts", "1", ps=1, worker=2)
    step = 12
    for _ in range(3):
        bench.wait_for_step("killed", step, process)
        before = bench.newest_step("killed")
        pids = bench.pids("hearth-worker", "killed")
        check(pids, "no worker is running")
        os.kill(pids[-1], signal.SIGKILL)
        step = before + 12
    code = bench.end(process)
    output = (bench.root / "killed.out").read_text()
    check_equal(code, 0, f"exit code\n{output}\n{bench.logs()}\nexit code")
    check_equal(output.count("restart 1 of 1 from the newest snapshot"), 3, f"restarts in\n{output}\nnumber")
    run = bench.run_json("killed")
    check_equal(run["model_hash"], whole["model_hash"], "hash after three kills with one restart allowed")
    check_equal(run["restarts"], 3, "restarts in run.json")
    only, = eras(bench, "killed")
    check_equal((only["starts"], only["restarts"], only["from_step"]), (4, 3, 1), "starts, restarts and first step")
    check_equal((only["to_step"], only["records"]), (run["steps"], LONG), "last step and records of the era")
    check_equal(only["end"]["status"], "finished", "end")
    check(only["evaluation"], "the era's evaluation is not there")


def a_fork_goes_another_way_from_a_kept_snapshot(bench):
    bench.generate(records=LONG)
    keep = ["snapshot.keep=10"]
    bench.train("forked", ps=2, worker=2, sets=[*keep, *PUBLISHING, "training.steps_max=36"])
    old_chain = bench.root / "forked" / "export" / "delta" / "12"
    check((old_chain / "2" / "manifest.json").exists(), "the first line was not published")
    arguments = bench.train_arguments("forked", ps=1, worker=4, sets=[*keep, *PUBLISHING, *CHANGE])
    bench.run(*arguments, "--from", 25, expect=66)
    check("no snapshot of step 25 is kept; give --from one of those that are: 0, 12, 24, 36" in bench.output,
          bench.output)
    bench.run(*arguments, "--fresh", "--from", 24, expect=64)
    bench.run(*arguments, "--from", 24)
    forked = bench.run_json("forked")
    check_finished(forked, LONG)
    check("snapshots/36.aside-1 and stays" in bench.output, bench.output)
    check("export/delta/12/2.aside-1 and stays" in bench.output, bench.output)
    left = bench.root / "forked" / "snapshots" / "36.aside-1"
    for reader in ("verify", "inspect"):
        bench.run(reader, left)
    bench.run("export", left, "--out", bench.root / "of_the_line_left")
    bench.run("eval", bench.job, "--snapshot", left, "--logs", bench.data / "test.csv")
    # The same change at the same step, without a line that was left.
    bench.train("straight", ps=2, worker=1, sets=["training.steps_max=24"])
    straight = bench.train("straight", ps=2, worker=1, sets=CHANGE)
    check_equal(forked["model_hash"], straight["model_hash"], "hash of the new line")
    check_equal(forked["samples"], straight["samples"], "ledger of the new line")
    # Who serves the first line finds a full export, and no delta on what it has.
    check_equal(sorted(path.name for path in old_chain.iterdir()), ["1", "2.aside-1"], "deltas on the first export")
    check((bench.root / "forked" / "export" / "36" / "manifest.json").exists(), "no full export behind the fork")
    check((bench.root / "forked" / "export" / "delta" / "36" / "1").exists(), "no delta on it")
    bench.run("export", "--apply", bench.root / "forked" / "export" / "36", "--out", bench.root / "merged")
    bench.run("verify", bench.root / "merged")
    first, second = eras(bench, "forked")
    check_equal((first["from_step"], first["to_step"], first["set_aside_from"]), (1, 36, 25), "the first line")
    check_equal((first["published"]["step"], first["published"]["seq"]), (36, 2), "published of the first line")
    check_equal((second["from_step"], second["to_step"]), (25, forked["steps"]), "the second line")
    check_equal(second["fork"], {"number": 1, "back_to": 24}, "fork")
    check("training.clip_norm: 0 -> 5" in second["changes"], f"changes {second['changes']}")
    check_equal(second["published"]["base"], 36, "published of the second line")
    text = bench.run("history", bench.root / "forked")
    check("back to 24 (fork 1); changed" in text and "set aside from step 25 on" in text, text)


def a_copy_elsewhere_goes_on_without_the_place_it_came_from(bench):
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=2, worker=2, sets=PUBLISHING)
    bench.train("here", ps=2, worker=2, sets=[*PUBLISHING, "training.steps_max=24"])
    there = bench.root / "another" / "place"
    there.parent.mkdir()
    shutil.copytree(bench.root / "here", there, symlinks=True)
    shutil.rmtree(bench.root / "here")
    moved = bench.train("another/place", ps=1, worker=4, sets=PUBLISHING)
    check_finished(moved, LONG)
    check_equal(moved["model_hash"], whole["model_hash"], "hash of the run that moved")
    for reader in ("verify", "inspect", "history"):
        bench.run(reader, there)
    bench.run("export", there, "--out", bench.root / "bundle")
    check_equal(sorted(path.name for path in (there / "export" / "delta" / "12").iterdir()),
                sorted(path.name for path in (bench.root / "whole" / "export" / "delta" / "12").iterdir()),
                "deltas of the chain that moved")
    old = str(bench.root / "here").encode()
    newest = there / "snapshots" / str(bench.newest_step("another/place"))
    for path in [there / "job.txtpb", there / "run.json", there / "history.jsonl", *newest.rglob("*")]:
        # RocksDB's own log tells of where it was; nothing reads it.
        if path.is_file() and not path.name.startswith("LOG"):
            check(old not in path.read_bytes(), f"{path.relative_to(there)} names the old place")
    check(not pathlib.Path(os.fsdecode(old)).exists(), "somebody wrote to the old place")


CASES = [each_new_snapshot_begins_the_count_of_restarts_anew, a_fork_goes_another_way_from_a_kept_snapshot,
         a_copy_elsewhere_goes_on_without_the_place_it_came_from]

if __name__ == "__main__":
    main(CASES, "hearth-life-")
