#!/usr/bin/env python3
"""A job that changes on its way: what is carried on with, and from which step. As e2e.py, whose helpers it uses.

Usage: changes.py --bin DIR CASE     (or: all)
"""
import json
import os
import re
import shutil
import signal

from e2e import LONG, RECORDS, SPEC, check, check_equal, check_finished, main

CHANGES = ["training.dense_optimizer.learning_rate=0.01", "table[user].optimizer.learning_rate=0.2",
           "task[like].weight=3", "training.clip_norm=5", "training.staleness=2"]


def inspect(bench, name):
    return json.loads(bench.run("inspect", bench.root / name, "--json"))


def a_changed_job_goes_on_and_its_bits_are_those_of_the_changes(bench):
    bench.generate(records=LONG)
    for name, ps, worker in (("one", 1, 1), ("two", 2, 4)):
        bench.train(name, ps=ps, worker=worker, sets=["training.steps_max=30"])
    one = bench.train("one", ps=2, worker=2, sets=CHANGES)
    check("changed from step 31 on: training.staleness: 0 -> 2" in bench.output, bench.output)
    check_finished(one, LONG)
    # The same list on other numbers of processes, a worker killed before and after the new job's first snapshot.
    process = bench.start("two", "--max-restarts", "10", ps=3, worker=2, sets=CHANGES)
    for step in (30, 60):
        bench.wait_for_step("two", step, process)
        pids = bench.pids("hearth-worker", "two")
        if pids:
            os.kill(pids[-1], signal.SIGKILL)
    check_equal(bench.end(process), 0, f"exit code\n{(bench.root / 'two.out').read_text()}\nexit code")
    two = bench.run_json("two")
    check_equal(two["model_hash"], one["model_hash"], "hash of the same changes at the same step")
    check_equal(two["samples"], one["samples"], "ledger")
    eras = inspect(bench, "two")["eras"]
    check_equal([era["from_step"] for era in eras], [31], "eras")
    # With them training.steps_max, whose old value was a cut, and cuts decide views now.
    check_equal(len(eras[0]["changes"]), len(CHANGES) + 1, f"changes in {eras}")
    check_equal(inspect(bench, "one")["eras"], eras, "eras of both runs")
    # None of it goes without saying: the unchanged job's hash is another, and so is that of the changes from step 1 on.
    plain = bench.train("plain", worker=2)
    always = bench.train("always", worker=2, sets=CHANGES)
    check_equal(len({one["model_hash"], plain["model_hash"], always["model_hash"]}), 3, "different hashes")


def what_may_not_change_is_told_before_anything_is_touched(bench):
    bench.generate()
    first = bench.train("run", worker=2, sets=["training.steps_max=20"])
    kept = {path: path.read_bytes() for path in (bench.root / "run").rglob("*") if path.is_file()}
    refused = ["table[user].dim=8", "training.batch_size=64"]
    sets = [item for one in refused + ["snapshot.every_steps=7", "training.clip_norm=1"] for item in ("--set", one)]
    bench.run("train", bench.job, "--out", bench.root / "run", "--print-changes", *sets, expect=78)
    for line in ("carried   training.clip_norm: 0 -> 1  (from step 21 on)", "free      snapshot.every_steps: 12 -> 7",
                 "refused   training.batch_size: 128 -> 64  (inside a log", "(it decides what a row holds"):
        check(line in bench.output, f"no line \"{line}\" in\n{bench.output}")
    bench.train("run", expect=78, worker=2, sets=refused)
    check("training.batch_size: 128 -> 64: inside a log" in bench.output, bench.output)
    now = {path: path.read_bytes() for path in (bench.root / "run").rglob("*") if path.is_file()}
    check_equal(now.keys(), kept.keys(), "files of the run")
    check(all(now[path] == kept[path] for path in kept), "a file of the run was touched")
    # An evaluation takes another learning rate for the same model.
    bench.run("eval", bench.job, "--snapshot", bench.root / "run", "--logs", bench.data / "test.csv", "--set",
              "training.dense_optimizer.learning_rate=1", "--set", "training.batch_size=64")
    # At an epoch's end the batch size is free to change: the next one is read anew.
    bench.train("run", worker=2)
    grown = bench.train("run", ps=2, worker=1, sets=["training.epochs=2", "training.batch_size=64"])
    check_equal(grown["samples"]["read"], 2 * RECORDS, "samples read")
    bench.train("other", worker=2, sets=["training.steps_max=20"])
    bench.train("other", worker=2)
    other = bench.train("other", worker=4, sets=["training.epochs=2", "training.batch_size=64"])
    check_equal(grown["model_hash"], other["model_hash"], "hash of a second epoch in other batches")
    check(first["model_hash"] != grown["model_hash"], "nothing was trained")


# --- the next day's log ---

DAYS = 7


def a_week(bench):
    """A log of a file a day, and the job that is cut after each of them."""
    (bench.root / "spec.txtpb").write_text(SPEC.replace("part_records: 2500", f"part_records: {RECORDS // DAYS + 1}"))
    bench.run("generate", bench.root / "spec.txtpb", "--out", bench.data, "--records", RECORDS)
    text = (bench.data / "job.txtpb").read_text().replace('name: "train"', 'name: "train" cut_after: FILE', 1)
    text = re.sub(r"  piece_bytes: .*\n", "", text)
    paths = re.findall(r'  path: "train/.*"\n', text)
    check_equal(len(paths), DAYS, "files of the log")
    return text, paths


def job_of(bench, name, text, paths, days):
    """The job that names these days, over files of its own."""
    data = bench.root / f"{name}-data"
    if not data.exists():
        shutil.copytree(bench.data, data)
    (data / "job.txtpb").write_text(text.replace("".join(paths), "".join(paths[day] for day in days)))
    return data


def day_by_day_has_the_bits_of_one_command_over_all(bench):
    text, paths = a_week(bench)
    for staleness in (0, 2):
        sets = [f"training.staleness={staleness}"]
        once = f"once-{staleness}"
        data = job_of(bench, once, text, paths, range(DAYS))
        whole = bench.train(once, ps=2, worker=2, sets=sets, job=data / "job.txtpb")
        check_finished(whole)
        week = f"week-{staleness}"
        for day in range(DAYS):
            # Yesterday's file is named still, those before are not; each goes once it is consumed.
            data = job_of(bench, week, text, paths, range(max(0, day - 1), day + 1))
            options = dict(ps=1 + day % 3, worker=(1, 2, 4)[day % 3], sets=sets, job=data / "job.txtpb")
            if day == 3:  # a worker dies on the way
                process = bench.start(week, "--max-restarts", "5", **options)
                bench.wait_for_step(week, bench.newest_step(week) + 1, process)
                for pid in bench.pids("hearth-worker", week)[-1:]:
                    os.kill(pid, signal.SIGKILL)
                check_equal(bench.end(process), 0, f"exit code\n{(bench.root / f'{week}.out').read_text()}\nexit code")
                run = bench.run_json(week)
            else:
                run = bench.train(week, **options)
            check_equal(run["status"], "finished", f"day {day}")
            (data / f"train/part-{day:04}.csv").unlink()
        check_equal(run["model_hash"], whole["model_hash"], f"hash of the week at staleness {staleness}")
        check_equal(inspect(bench, week)["step"], inspect(bench, once)["step"], "steps of the week")
        check_equal(run["samples"], whole["samples"], "ledger of the week")
        shown = inspect(bench, week)
        check_equal(shown["consumed"]["files"], DAYS - 2, "files that have left the list")
        # Yesterday's and today's file are named still, and gone. A batch system is told the same.
        bench.run("submit", data / "job.txtpb", "--out", bench.root / week, "--print", "--time", "10")
        told = [line for era in shown["eras"] for line in era["changes"]]
        check_equal(told, [f"log[0]: 1 file more, from train/part-{day:04}.csv on" for day in range(1, DAYS)], "eras")


def a_directory_that_had_ended_goes_on_with_tomorrows_file(bench):
    text, paths = a_week(bench)
    name = "tail"
    data = job_of(bench, name, text, paths, [0])
    job = data / "job.txtpb"
    job.write_text(job.read_text().replace(paths[0], '  directory: "in" idle_seconds_max: 1\n'))
    (data / "in").mkdir()
    read = 0
    for day in range(3):
        os.rename(data / f"train/part-{day:04}.csv", data / f"in/{day}.csv")
        run = bench.train(name, worker=2, job=job)
        check(run["samples"]["read"] > read, f"day {day} was not read")
        read = run["samples"]["read"]
        hash_before = run["model_hash"]
        again = bench.train(name, worker=2, job=job)
        check("nothing left to do" in bench.output, bench.output)
        check_equal(again["model_hash"], hash_before, "hash without a new file")
    (data / "in/0.csv").unlink()
    check_equal(bench.train(name, worker=2, job=job)["model_hash"], hash_before, "hash with a consumed file gone")


def lanes_and_logs_change_where_a_log_ends(bench):
    text, paths = a_week(bench)
    one_log = text.replace(" cut_after: FILE", "")
    for name, shape in (("a", dict(ps=1, worker=1)), ("b", dict(ps=2, worker=2))):
        job = job_of(bench, name, one_log, paths, range(3)) / "job.txtpb"
        bench.train(name, job=job, **shape)
        # Another log behind the first, in other lanes and batches.
        more = job.read_text().replace("side_table {", 'log { name: "more" ' + "".join(paths[3:]) +
                                       ' join: "user" join: "video" }\nside_table {', 1)
        job.write_text(more)
        bench.train(name, job=job, sets=["training.lanes=2", "training.batch_size=96"], **shape)
    a, b = bench.run_json("a"), bench.run_json("b")
    check_finished(a)
    check_equal(b["model_hash"], a["model_hash"], "hash with other lanes for the second log")
    check_equal(b["samples"], a["samples"], "ledger")
    lines = [line for era in inspect(bench, "a")["eras"] for line in era["changes"]]
    check("training.lanes: 4 -> 2" in lines, f"no change of lanes in {lines}")
    # Another day's attributes, too, where the log has ended, and nowhere else.
    with open(bench.root / "a-data/user.csv", "a") as users:
        users.write(open(bench.root / "a-data/user.csv").read().splitlines()[-1].replace(",", "9,", 1) + "\n")
    job = bench.root / "a-data/job.txtpb"
    half = ["training.lanes=2", "training.batch_size=96", "training.epochs=2"]
    bench.train("a", job=job, sets=half + ["training.steps_max=70"])
    lines = [line for era in inspect(bench, "a")["eras"] for line in era["changes"]]
    check(any(line.startswith('side_table "user": ') for line in lines), f"no change of a side table in {lines}")
    with open(bench.root / "a-data/user.csv", "a") as users:
        users.write("\n")
    bench.train("a", job=job, sets=half, expect=65)
    # Inside a log the lanes stay.
    bench.train("c", job=bench.job, sets=["training.steps_max=5"])
    bench.train("c", job=bench.job, sets=["training.lanes=2"], expect=78)
    check("training.lanes: 4 -> 2: inside a log" in bench.output, bench.output)


def a_file_that_was_trained_under_another_name_is_told(bench):
    text, paths = a_week(bench)
    data = job_of(bench, "run", text, paths, [0])
    first = bench.train("run", job=data / "job.txtpb")
    shutil.copy(data / "train/part-0000.csv", data / "train/part-0001.csv")
    job_of(bench, "run", text, paths, [0, 1])
    bench.train("run", job=data / "job.txtpb", expect=78)
    check("part-0001.csv has the length and the head of" in bench.output and "--again" in bench.output, bench.output)
    check_equal(inspect(bench, "run")["model_hash"], first["model_hash"], "hash after the refusal")
    bench.run(*bench.train_arguments("run", job=data / "job.txtpb"), "--again")
    check_equal(bench.run_json("run")["samples"]["read"], 2 * first["samples"]["read"], "records read")


def rates_decay_and_means_are_the_steps_wherever_a_run_was_cut(bench):
    bench.generate()
    dense = "training.dense_optimizer."
    sets = [dense + "kind=ADAMW", dense + "weight_decay=0.05", dense + "schedule.kind=COSINE",
            dense + "schedule.warmup_steps=10", dense + "schedule.decay_steps=40", dense + "ema_decay=0.9",
            "table[user].optimizer.schedule.kind=STEP", "table[user].optimizer.schedule.step_every=15"]
    whole = bench.train("whole", ps=1, worker=1, sets=sets)
    for steps, ps, worker in ((7, 1, 2), (25, 2, 1)):  # in the warm-up, and in the decay
        bench.train("cut", ps=ps, worker=worker, sets=sets + [f"training.steps_max={steps}"])
    cut = bench.train("cut", ps=2, worker=4, sets=sets)
    check_equal(cut["model_hash"], whole["model_hash"], "hash of the run that was cut")
    steps = whole["steps"]
    check(steps > 40, f"the decay has an end, step 40 of {steps}")
    check_equal(whole["learning_rate"]["dense"], 0, "learning rate at the decay's end")
    check(abs(whole["learning_rate"]["tables"]["user"] / 0.05 - 0.1 ** ((steps - 1) // 15)) < 1e-9,
          f"learning rates {whole['learning_rate']}")
    # A plain job that turns to all of it at the same step, on other numbers of processes.
    for name, ps, worker in (("early", 1, 4), ("late", 2, 2)):
        bench.train(name, ps=ps, worker=4, sets=["training.steps_max=20"])
        bench.train(name, ps=ps, worker=worker, sets=sets)
    check("training.dense_optimizer.kind: ADAM -> ADAMW" in bench.output, bench.output)
    turned = [bench.run_json(name)["model_hash"] for name in ("early", "late")]
    check_equal(turned[0], turned[1], "hash of the jobs that turned")
    check(turned[0] != whole["model_hash"], "it makes no difference from when on")
    # The mean serves in the evaluation, in the bundle and in what proves it, and only where it is asked for.
    losses = {}
    for serves in ("false", "true"):
        one = bench.train("serves-" + serves, sets=sets + [dense + "ema_serves=" + serves])
        check_equal(one["model_hash"], whole["model_hash"], "hash with a mean that serves")
        bundle = bench.root / ("bundle-" + serves)
        bench.run("export", bench.root / ("serves-" + serves), "--out", bundle)
        bench.run("score", bundle, "--logs", bench.data / "test.csv")
        losses[serves] = {name: task["test"]["log_loss"] for name, task in one["tasks"].items()}
    check(losses["true"] != losses["false"], f"the mean does not serve: {losses}")


CASES = [a_changed_job_goes_on_and_its_bits_are_those_of_the_changes,
         what_may_not_change_is_told_before_anything_is_touched,
         day_by_day_has_the_bits_of_one_command_over_all, a_directory_that_had_ended_goes_on_with_tomorrows_file,
         lanes_and_logs_change_where_a_log_ends, a_file_that_was_trained_under_another_name_is_told,
         rates_decay_and_means_are_the_steps_wherever_a_run_was_cut]

if __name__ == "__main__":
    main(CASES, "hearth-changes-")
