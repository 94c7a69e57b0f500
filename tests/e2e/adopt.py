#!/usr/bin/env python3
"""A trained model taken over into a run whose job has another shape. As e2e.py, whose helpers it uses.

Usage: adopt.py --bin DIR CASE     (or: all)
"""
import json
import pathlib
import re

from e2e import RECORDS, check, check_equal, check_finished, main

DIFFERENCE = re.compile(r'compared with the old model over (\d+) records of log "test": largest difference (\S+) ')


def without(text, kind, name):
    left = re.sub(r'%s \{\n  name: "%s"\n(?:  .*\n)*\}\n' % (kind, name), "", text)
    check(left != text, f"the job has no {kind} {name}")
    return left


def files_of(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def inspect(bench, name):
    return json.loads(bench.run("inspect", bench.root / name, "--json"))


def rows_of(bench, name):
    return {table: stats["rows"] for table, stats in inspect(bench, name)["tables"].items()}


def a_small_model(bench, *sets):
    """Trained by a job that lacks a slot and its table, a dense feature, and a category's only task."""
    bench.generate()
    text = pathlib.Path(bench.job).read_text()
    for kind, name in (("slot", "author_id"), ("table", "author"), ("dense", "register_days"), ("task", "like")):
        text = without(text, kind, name)
    old = bench.data / "old.txtpb"
    old.write_text(text)
    return old, bench.train("old", worker=2, job=old, sets=["training.steps_max=30", *sets])


def adopt(bench, job, name, *arguments, expect=0):
    return bench.run("adopt", bench.root / "old", job, "--out", bench.root / name, *arguments, expect=expect)


def line_of(output, what):
    """carried, born, reset and dropped of a line of the table."""
    found = re.search(rf"^{re.escape(what)}  .*?(\d+) +(\d+) +(\d+) +(\d+)", output, re.M)
    check(found is not None, f"no line {what} in\n{output}")
    return tuple(map(int, found.groups()))


def a_model_goes_on_with_a_new_slot_a_feature_and_a_task(bench):
    old_job, old = a_small_model(bench, "training.dense_optimizer.ema_decay=0.9")
    kept = files_of(bench.root / "old")
    sets = ["--set", "training.dense_optimizer.ema_decay=0.9"]
    # What would be done is told, and not done.
    plan = adopt(bench, bench.job, "new", "--dry-run", *sets)
    check(not (bench.root / "new").exists(), "a dry run has made a folder")
    rows = rows_of(bench, "old")
    for table, count in rows.items():
        check_equal(line_of(plan, f"table {table}"), (count, 0, 0, 0), f"rows of {table}")
    check_equal(line_of(plan, "slot author_id"), (0, 16, 0, 0), "columns of the new slot")
    check_equal(line_of(plan, "task click")[1:], (0, 0, 0), "parameters of a task that stays")
    check_equal(line_of(plan, "task like")[0], 0, "parameters of a task that is born")

    told = adopt(bench, bench.job, "new", *sets)
    check(told.startswith(plan[:plan.index("\n")]), "the adoption tells another plan")
    found = DIFFERENCE.search(told)
    check(found is not None and found[1] == "64" and float(found[2]) < 1e-6, f"no difference in\n{told}")
    check("trained on 3 files of the job's logs already" in told, told)
    check_equal(rows_of(bench, "new"), dict(rows, author=0), "rows that were carried")
    bench.run("verify", bench.root / "new")
    adopted = inspect(bench, "new")
    check_equal(adopted["adoption"], {"step": 30, "model_hash": old["model_hash"], "first_step": 30}, "adoption")
    check_equal((adopted["step"], adopted["samples"]["read"]), (30, 0), "step and records")
    says = f"adopted from step 30 of model {old['model_hash']}"
    check(says in bench.run("history", bench.root / "new"), bench.output)
    # A function of the model and the job.
    adopt(bench, bench.job, "twin", *sets)
    check_equal(inspect(bench, "twin")["model_hash"], adopted["model_hash"], "hash of the same adoption")

    # It goes on, on any number of processes, also cut in two; a file that the model knows is trained when asked for.
    more = dict(sets=["training.dense_optimizer.ema_decay=0.9"])
    bench.train("new", expect=78, **more)
    check("was trained on before it was taken over" in bench.output, bench.output)
    bench.run(*bench.train_arguments("new", worker=1, **more), "--again")
    new = bench.run_json("new")
    check_finished(new)
    short = dict(sets=[*more["sets"], "training.steps_max=60"])
    bench.run(*bench.train_arguments("twin", ps=2, worker=2, **short), "--again")
    check_equal(bench.newest_step("twin"), 60, "step of the first half")
    bench.train("twin", ps=1, worker=4, **more)
    twin = bench.run_json("twin")
    check_equal(twin["model_hash"], new["model_hash"], "hash on other numbers of processes")
    check(bench.newest_step("new") > 60, "the second half is empty")
    shown = inspect(bench, "twin")
    check_equal(shown["adoption"], adopted["adoption"], "adoption, at the end")
    check_equal(shown["eras"], [], "eras")
    check(says in bench.run("history", bench.root / "twin"), bench.output)
    check(rows_of(bench, "new")["author"] > 0, "the new table has learnt nothing")
    now = files_of(bench.root / "old")
    check_equal(now, kept, "files of the old run")
    # From step 0 on: schedules and expiry begin anew. Said at once, files that the model knows are no question later.
    told = adopt(bench, bench.job, "zero", "--step", "0", "--again", *sets)
    check("trained on 3 files" not in told, told)
    zero = inspect(bench, "zero")
    check_equal((zero["step"], zero["adoption"]["step"]), (0, 30), "steps")
    bench.train("zero", worker=2, sets=[*more["sets"], "training.steps_max=12"])
    check_equal(bench.newest_step("zero"), 12, "step")


def what_cannot_be_taken_over_is_told_and_nothing_is_made(bench):
    old_job, old = a_small_model(bench)
    kept = files_of(bench.root / "old")
    text = old_job.read_text()
    before = sorted(path.name for path in bench.root.iterdir())

    def refused(edits, says, *arguments, expect=78):
        edited = text
        for was, now in edits:
            check(was in edited, f"the job has no {was}")
            edited = edited.replace(was, now)
        job = bench.data / "edited.txtpb"
        job.write_text(edited)
        adopt(bench, job, "new", *arguments, expect=expect)
        check(says in bench.output, f"no \"{says}\" in\n{bench.output}")
        check_equal(sorted(path.name for path in bench.root.iterdir()), before, "folders")

    click = [('task {\n  name: "click"', 'task {\n  name: "tap"')]
    refused(click, 'task "click" is gone and "tap" is new: if one is another under a new name')
    hour = [('slot {\n  name: "hour"', 'slot {\n  name: "clock"\n  was: "hour"\n  column: "hour"')]
    refused(hour, 'add salt: "hour"')
    refused([("dim: 16", "dim: 12")], "columns of its rows would go; keep dim: 16, or let them go with --truncate")
    refused([(click[0][0], click[0][1] + '\n  was: "nobody"')], 'was: "nobody": the model has no such task')
    refused([], "there is nothing left to train", "--set", "training.steps_max=30")
    refused([], "the model has no slot", "--drop", "slot:nobody")
    # A disk that would be too full.
    refused([], "disk_free_bytes_min", "--set", f"snapshot.disk_free_bytes_min={10**18}", expect=74)
    # A log that cannot be read keeps nobody from it, unless a rate is to be counted there.
    refused([('name: "long_view"', 'name: "view"'), ("  base_rate: 0.25\n", ""), ('path: "train/', 'path: "gone/')],
            "give task.base_rate", "--drop", "task:long_view", expect=66)
    bench.run("adopt", bench.root / "nobody", bench.job, "--out", bench.root / "new", expect=66)
    adopt(bench, bench.job, "old", expect=78)
    check("has a model already, at step 30" in bench.output, bench.output)
    bench.run("adopt", bench.root / "old", bench.job, expect=64)
    check_equal(files_of(bench.root / "old"), kept, "files of the old run")
    # A job that grows in its own folder is told the way.
    bench.train("old", expect=78, worker=2)
    check("hearth adopt DIR JOB --out NEWDIR" in bench.output, bench.output)

    # What the same edits do where the job says what is meant.
    said = [(click[0][0], click[0][1] + '\n  was: "click"'), (hour[0][0], hour[0][1] + '\n  salt: "hour"')]
    tables = re.findall(r'table \{\n  name: .*\n(?:  .*\n)*\}\n', text)
    check(len(tables) >= 4, "tables of the job")
    edited = text.replace("".join(tables), "".join(reversed(tables)))
    for was, now in said:
        edited = edited.replace(was, now)
    job = bench.data / "renamed.txtpb"
    job.write_text(edited)
    told = adopt(bench, job, "new")
    found = DIFFERENCE.search(told)
    check(found is not None and float(found[2]) < 1e-6, f"no difference in\n{told}")
    check_equal(rows_of(bench, "new"), rows_of(bench, "old"), "rows of reordered tables")
    bench.run("eval", job, "--snapshot", bench.root / "new", "--logs", bench.data / "test.csv")
    # Columns, experts and optimizers that are others: predictions change, and that is told.
    job.write_text(text.replace("kind: ADAGRAD", "kind: ADAM").replace("dim: 16", "dim: 12"))
    told = adopt(bench, job, "cut", "--truncate", "--set", "model.shared_experts_1=3")
    for line in ("optimizer ADAGRAD -> ADAM; optimizer state begins anew",
                 "predictions may change: table \"user\" has lost columns", "predictions may change: level1.shared.expert: 2 -> 3 experts"):
        check(line in told, f"no \"{line}\" in\n{told}")
    bench.run(*bench.train_arguments("cut", worker=2, job=job,
                                     sets=["model.shared_experts_1=3", "training.steps_max=40"]), "--again")


CASES = [a_model_goes_on_with_a_new_slot_a_feature_and_a_task, what_cannot_be_taken_over_is_told_and_nothing_is_made]

if __name__ == "__main__":
    main(CASES, "hearth-adopt-")
