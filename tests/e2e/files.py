#!/usr/bin/env python3
"""What is trained is what was listed, once: silence, amended files, saves that are asked for early. As e2e.py,
whose helpers it uses.

Usage: files.py --bin DIR CASE     (or: all)
"""
import gzip
import os
import signal
import time

import e2e
from e2e import check, check_equal

JOB = """
name: "identity" seed: 3
log { name: "train" %s }
slot { name: "user" table: "id" } slot { name: "item" table: "id" }
task { name: "click" category: "c" label: "click" base_rate: 0.5 }
table { name: "id" dim: 4 %s }
model { hidden_1: 8 hidden_2: 8 width_1: 8 width_2: 8 gate_rank_1: 2 gate_rank_2: 2 tower_hidden: 4 }
training { batch_size: 40 %s }
snapshot { every_steps: 10 }
"""


def write_job(bench, log, table="", training="lanes: 1"):
    path = bench.root / "job.txtpb"
    path.write_text(JOB % (log, table, training))
    bench.job = str(path)


def records(number, count=400):
    return "user,item,click\n" + "".join(f"u{i % 50},i{number}-{i},{i % 2}\n" for i in range(count))


def put(bench, path, content):
    """Whole, by rename."""
    aside = bench.root / "aside"
    aside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.rename(aside, path)


def a_silent_hour_ages_nothing(bench):
    """The same files with and without a pause between them: the same model, on one worker and on two."""
    for lanes, workers in ((1, 1), (2, 2)):
        hashes = {}
        for pause_s in (0, 2.5):
            name = f"run-{lanes}-{pause_s > 0}"
            folder = bench.root / f"in-{name}"
            folder.mkdir()
            write_job(bench, f'directory: "{folder}"', table="expire_after_steps: 15",
                      training=f"lanes: {lanes} idle_ms: 400")

            def day(number):  # a file for each lane
                for lane in range(lanes):
                    put(bench, folder / f"{number}-{lane}.csv", records(f"{number}-{lane}", 400 // lanes))

            day(0)
            process = bench.start(name, worker=workers)
            bench.wait_for_step(name, 10, process)
            time.sleep(pause_s)
            day(1)
            put(bench, folder / "_END", "")
            check_equal(bench.end(process), 0, "exit code")
            run = bench.run_json(name)
            e2e.check_finished(run, 800)
            check_equal(run["steps"], 21, "steps: 20 with records, one at the end")
            check(run["tables"]["id"]["rows_expired"] > 0, "no row expired at all: the test is too easy")
            hashes[pause_s] = run["model_hash"]
        check_equal(hashes[2.5], hashes[0], f"hash after a silence, {lanes} lanes")


def a_damaged_file_is_mended_or_taken_off(bench):
    """Each remedy that the error names leads on, and no record is read twice."""
    whole = gzip.compress(("user,item,click\n" + "".join(f"u{i * 7919 % 9973},i{i * 104729 % 99991},{i % 2}\n"
                                                         for i in range(12000))).encode())
    put(bench, bench.root / "a.csv", records(0))
    put(bench, bench.root / "c.csv", records(2))
    paths = {name: f'path: "{bench.root / name}"' for name in ("a.csv", "b.csv.gz", "c.csv")}
    for remedy in ("mended", "taken off"):
        put(bench, bench.root / "b.csv.gz", whole[:len(whole) // 2])
        write_job(bench, " ".join(paths.values()))
        name = remedy.replace(" ", "-")
        bench.train(name, expect=65)
        check("copy the file again" in bench.output or "copy the file again" in bench.logs(),
              "the error names its remedy")
        check(bench.newest_step(name) > 20, "nothing of the damaged file was trained: the test is too easy")
        if remedy == "mended":
            put(bench, bench.root / "b.csv.gz", whole)
            run = bench.train(name, worker=1)
            e2e.check_finished(run, 12800)
            clean = bench.train("clean")
            check_equal(run["model_hash"], clean["model_hash"], "hash of the run whose file was whole from the start")
        else:
            write_job(bench, paths["a.csv"] + " " + paths["c.csv"])
            samples = bench.train(name)["samples"]
            check(1200 < samples["read"] < 12800, f"{samples['read']} read: part of the file, and the others")
            check_equal(samples["read"], samples["trained"], "samples trained")
    os.remove(bench.root / "b.csv.gz")


def a_save_asked_for_while_the_ranks_start_is_remembered(bench):
    put(bench, bench.root / "a.csv", records(0, 8000))
    write_job(bench, f'path: "{bench.root / "a.csv"}"')
    clean = bench.train("clean")
    for wait_s in (0, 0.2, 0.6):
        process = bench.start("run")
        while not (bench.root / "run" / "lock").exists():
            check(process.poll() is None, "the run ended at once")
            time.sleep(0.001)
        time.sleep(wait_s)
        process.send_signal(signal.SIGUSR1)
        check_equal(bench.end(process), 75, f"exit code of a run that was asked to save {wait_s} s after its start")
        check_equal(bench.run_json("run")["status"], "saved", "status")
    check_equal(bench.train("run")["model_hash"], clean["model_hash"], "hash after the saves")


CASES = [
    a_silent_hour_ages_nothing, a_damaged_file_is_mended_or_taken_off,
    a_save_asked_for_while_the_ranks_start_is_remembered
]


if __name__ == "__main__":
    e2e.main(CASES, "hearth-identity-")
