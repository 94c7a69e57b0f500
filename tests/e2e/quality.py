#!/usr/bin/env python3
"""Evaluation while a job trains, and what follows from its figures: the best snapshot, an end without gain, what is not
published. As e2e.py, whose helpers it uses.

Usage: quality.py --bin DIR CASE     (or: all)
"""
import json
import os
import re
import signal
import time

from e2e import DEADLINE_S, LONG, check, check_equal, check_finished, main

EVALUATED = ["split[test].every_steps=12", "snapshot.keep=1", "snapshot.best.split=test", "snapshot.best.task=click"]


def inspect(bench, path):
    return json.loads(bench.run("inspect", bench.root / path, "--json"))


def kill_a_worker_at(bench, name, step, process):
    bench.wait_for_step(name, step, process)
    for pid in bench.pids("hearth-worker", name)[-1:]:
        os.kill(pid, signal.SIGKILL)


def the_best_snapshot_is_kept_through_kills_evaluated_again_and_exported(bench):
    bench.generate(records=LONG)
    plain = bench.train("plain", ps=1, worker=2)
    # The learning rate is too large to gain all the way: the best is not the last.
    rates = ["training.dense_optimizer.learning_rate=0.03", "training.epochs=2"]
    runs = {}
    for name, shape in (("a", dict(ps=1, worker=1)), ("b", dict(ps=2, worker=4))):
        process = bench.start(name, "--max-restarts", "10", sets=EVALUATED + rates, **shape)
        if name == "b":
            for step in (24, 120):
                kill_a_worker_at(bench, name, step, process)
        check_equal(bench.end(process), 0, f"exit code\n{(bench.root / f'{name}.out').read_text()}\nexit code")
        runs[name] = bench.run_json(name)
        check_finished(runs[name], 2 * LONG)
    best = runs["a"]["best"]
    check_equal(runs["b"]["best"], best, "best of another number of processes, with kills")
    check_equal(runs["b"]["model_hash"], runs["a"]["model_hash"], "hash")
    check_equal(inspect(bench, "a")["best"], best, "best in the newest MANIFEST")
    kept = sorted(int(path.name) for path in (bench.root / "b" / "snapshots").iterdir())
    check_equal(kept, sorted({best["step"], runs["b"]["steps"]}), "snapshots that are kept")
    check(best["step"] < runs["b"]["steps"], f"the last is the best, {best}: the test is too easy")
    check_equal(best["of"], "AUC of click on test", "what was judged")
    # What was evaluated while it trained is what the snapshot gives.
    bench.run("eval", bench.job, "--snapshot", bench.root / "b", "--best", "--logs", bench.data / "test.csv")
    auc = re.search(r"^click +\S+ +\d+ +\d+ +(\S+)", bench.output, re.MULTILINE).group(1)
    check_equal(auc, f"{best['value']:.4f}", "AUC of the best snapshot, evaluated again")
    bench.run("export", bench.root / "b", "--best", "--out", bench.root / "bundle", "--format", "safetensors")
    check_equal(json.loads((bench.root / "bundle/manifest.json").read_text())["train_step"], best["step"], "exported step")
    # To evaluate changes nothing, and who asks for no best has none.
    check_equal(bench.train("evaluated", ps=2, worker=2, sets=EVALUATED)["model_hash"], plain["model_hash"],
                "hash of a run that was evaluated on its way")
    for command in (["export", bench.root / "plain", "--best", "--out", bench.root / "none"],
                    ["eval", bench.job, "--snapshot", bench.root / "plain", "--best", "--logs",
                     bench.data / "test.csv"]):
        bench.run(*command, expect=66)
        check("knows no best snapshot" in bench.output, bench.output)


def a_job_without_gain_ends_at_the_same_step_however_it_is_run(bench):
    bench.generate(records=LONG)
    sets = EVALUATED + ["training.stop_after_no_gain=2", "training.epochs=20",
                        "training.dense_optimizer.learning_rate=0.03", "training.staleness=2"]
    ends = []
    for name, shape in (("a", dict(ps=1, worker=1)), ("b", dict(ps=2, worker=2)), ("c", dict(ps=1, worker=4))):
        process = bench.start(name, "--max-restarts", "10", sets=sets, **shape)
        if name == "c":
            kill_a_worker_at(bench, name, 12, process)
        check_equal(bench.end(process), 0, f"exit code\n{(bench.root / f'{name}.out').read_text()}\nexit code")
        run = bench.run_json(name)
        check_equal(run["status"], "finished", "status")
        check("in 2 evaluations in a row" in run["exit"]["reason"], f"reason {run['exit']}")
        check_equal(run["best"]["without_gain"], 2, "evaluations without gain")
        check(run["samples"]["read"] < 20 * LONG, "the job came to its other end")
        ends.append((run["steps"], run["model_hash"], run["samples"], run["best"]))
        check_equal(ends[-1], ends[0], f"end of {name}")
    again = bench.train("a", ps=1, worker=1, sets=sets)
    check("to go on, raise it or set it to 0" in bench.output, bench.output)
    check_equal(again["model_hash"], ends[0][1], "hash of a job that has ended")
    check("finished: AUC of click on test got no better" in bench.run("history", bench.root / "a"), bench.output)
    sets = [one.replace("no_gain=2", "no_gain=3") for one in sets]
    check(bench.train("a", ps=2, worker=2, sets=sets)["steps"] > ends[0][0], "a higher bound did not go on")


def what_would_make_serving_worse_is_withheld_and_covered_later(bench):
    bench.generate(records=LONG)
    job = bench.data / "job.txtpb"
    text = job.read_text()
    sets = [*EVALUATED, "export.delta_every_steps=12", "export.waiting_max=100"]

    def require(bound):
        job.write_text(text + f'export {{ require {{ split: "test" task: "click" {bound} }} }}\n')

    require("min: 0.99")
    held = bench.train("run", worker=2, sets=[*sets, "training.steps_max=36"])
    check_equal((held["export"]["published"], held["export"]["withheld"]), (0, 3), "published and withheld")
    check(re.search(r"step 36: AUC of click on test is 0\.\d+, below 0\.99", held["export"]["withheld_reason"]),
          f"reason {held['export']}")
    check(not (bench.root / "run/export/36").exists(), "what was withheld is there")
    require("min: 0.3")
    run = bench.train("run", worker=2, sets=[*sets, "training.steps_max=72"])
    # What is committed and was not published is judged by the job as it is now.
    check_equal(run["export"]["base"], 36, "first publication")
    check_equal(run["export"]["step"], 72, "newest publication")
    require("max: 0.3")
    last = bench.train("run", worker=2, sets=sets)
    check(last["export"]["withheld"] > 0, f"nothing was withheld: {last['export']}")
    check_equal(last["export"]["step"], 72, "newest publication")
    log = (bench.root / "run/logs/scheduler-0.log").read_text()
    check("event=publication_withheld" in log, log)
    bench.check_logs()


def a_stream_is_evaluated_before_it_ends(bench):
    bench.generate(records=LONG)
    job = bench.data / "job.txtpb"
    (bench.data / "in").mkdir()
    text, paths = re.subn(r'  path: "train/.*"\n', "", job.read_text())
    check(paths > 1, "files of the log")
    job.write_text(text.replace('name: "train"', 'name: "train" directory: "in"', 1))
    process = bench.start("run", worker=2, sets=EVALUATED)
    for part in sorted((bench.data / "train").iterdir())[:5]:
        os.rename(part, bench.data / "in" / part.name)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        check(process.poll() is None and time.monotonic() < deadline, "the stream was not evaluated")
        try:
            run = bench.run_json("run")
        except OSError:
            run = {}
        if run.get("best"):
            break
        time.sleep(0.01)
    check(run["tasks"]["click"]["test"]["auc"] > 0.5, f"figures {run['tasks']}")
    check(run["progressive"]["tasks"]["click"]["labelled"] > 0, f"progressive {run['progressive']}")
    check_equal(run["status"], "running", "status")
    (bench.data / "in/_END").touch()
    check_equal(bench.end(process), 0, f"exit code\n{(bench.root / 'run.out').read_text()}\nexit code")
    check("before training: loss 0." in (bench.root / "run.out").read_text() or
          bench.run_json("run")["seconds"] < 10, "the progress line does not say what its figures are")


CASES = [the_best_snapshot_is_kept_through_kills_evaluated_again_and_exported,
         a_job_without_gain_ends_at_the_same_step_however_it_is_run,
         what_would_make_serving_worse_is_withheld_and_covered_later, a_stream_is_evaluated_before_it_ends]

if __name__ == "__main__":
    main(CASES, "hearth-quality-")
