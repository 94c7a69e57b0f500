#!/usr/bin/env python3
"""What a log holds beside good records: numbers as other tools write them, values and keys that fit nothing, small
files.

Usage: records.py --bin DIR CASE     (or: all)
"""
import re

from e2e import check, check_equal, main

JOB = """
name: "reading" seed: 3
log { name: "train" path: "data.csv" %(log)s }
task { name: "t" category: "c" label: "%(label)s" }
dense { name: "x" transform: STANDARD mean: 50 deviation: 29 }
slot { name: "b" column: "x" table: "e" kind: BUCKET boundary: [10, 20, 30, 40, 51, 60, 70, 80, 90] }
slot { name: "z" table: "e" hash: RAW }
table { name: "e" dim: 4 }
model { kind: SHARED_BOTTOM }
training { batch_size: 256 epochs: %(epochs)d }
split { name: "test" log { name: "test" path: "data.csv" %(log)s } }
%(more)s
"""


def write(bench, name, *, records=3000, before="", after="", y=lambda x: int(x > 50), label="y", log="", more="",
          epochs=1):
    """A folder of its own with a job and its log; y follows x, each number between `before` and `after`."""
    folder = bench.root / f"{name}-data"
    folder.mkdir()
    lines = ["y,x,z"]
    for i in range(records):
        x = i * 7919 % 100
        lines.append(",".join(f"{before}{value}{after}" for value in (y(x), x, x)))
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    (folder / "job.txtpb").write_text(JOB % {"label": label, "log": log, "more": more, "epochs": epochs})
    return folder / "job.txtpb"


def numbers_as_other_tools_write_them_train_the_same_model(bench):
    plain = bench.train("plain", job=write(bench, "plain", epochs=4))
    for name, before, after in (("blanks", " ", " "), ("plus", "+", ""), ("points", "", ".0")):
        run = bench.train(name, job=write(bench, name, before=before, after=after, log="piece_bytes: 4194304",
                                                  epochs=4), sets=["training.lanes=1"])
        check_equal(run["columns"], {}, f"{name}: columns with texts that are no numbers")
        check_equal(run["model_hash"], plain["model_hash"], f"{name}: model of the same numbers")
    check(plain["tasks"]["t"]["test"]["auc"] > 0.99, f"the model does not know its data: {plain['tasks']['t']}")


def a_job_that_trained_nothing_is_bad_data_and_says_why(bench):
    cases = {
        "header_alone": (dict(records=0), "not one record to read in data.csv"),
        "filtered": (dict(log="where: 'y == 7'"), "3000 filtered"),
        "labels": (dict(y=lambda x: x > 50), 'column "y" holds no number in 3000 records, for example "False"'),
        "comparison": (dict(y=lambda x: x > 50, label="y > 0"), 'column "y" holds no number'),
    }
    for name, (how, cause) in cases.items():
        bench.train(name, job=write(bench, name, **how), expect=65)
        check("nothing was trained" in bench.output and cause in bench.output, f"{name}: told\n{bench.output}")
        check_equal(bench.run_json(name)["exit"]["code"], 65, f"{name}: exit code in run.json")
    check_equal(
        bench.run_json("labels")["columns"], {"y": {"unreadable": 3000, "example": "False"}}, "counted in run.json")
    check_equal(bench.run_json("labels")["samples"]["trained"], 3000, "trained without a label")
    job = write(bench, "folder")
    bench.train("folder", job=job, sets=[f"log[0].path={job.parent}"], expect=78)
    check("is a folder" in bench.output, f"a folder as path is told\n{bench.output}")


def what_fits_nothing_is_counted_and_told(bench):
    job = write(bench, "run", label="y == 'yes' || missing(age)", after="", log='join: "side"',
                more='side_table { name: "side" path: "side.csv" key: "z" }')
    (job.parent / "side.csv").write_text("z,age\n" + "".join(f"{z}.0,{z}\n" for z in range(100)))
    run = bench.train("run", job=job)
    check_equal(run["side_tables"], {"side": {"matched": 0, "unmatched": 3000, "without_key": 0, "example": "0"}},
                "join")
    check_equal(run["labels"], {"t": {"positives": 3000, "negatives": 0, "masked": 0}}, "labels")
    for text in ('hearth: warning: side_table "side": ', "is always positive, on all 3000",
                 'split "test", task "t": no negative label among 3000'):
        check(text in bench.output, f"{text} is not told\n{bench.output}")
        check(any(text.split("warning: ")[-1] in line for line in run["warnings"]), f"{text} is not in run.json")
    check(re.search(r"^side +0 +3000 +0", bench.output, re.M), f"the table at the end\n{bench.output}")


def a_small_file_gives_each_lane_a_share_and_a_resume_keeps_it(bench):
    job = write(bench, "new", records=20000)
    run = bench.train("new", job=job, worker=2)
    check(run["steps"] <= 80, f"20,000 records in batches of 256: {run['steps']} steps")
    check_equal(run["warnings"], [], "warnings")
    pieces = [int(n) for n in re.findall(r"piece_bytes: (\d+)", (bench.root / "new" / "job.txtpb").read_text())]
    check_equal(pieces[0], (job.parent.joinpath("data.csv").stat().st_size + 1) // 2, "piece_bytes of two lanes")
    # A run of the version before has the old default written out; it goes on with it, and so does the new one, on any
    # number of workers.
    old = bench.train("old", job=job, worker=2, sets=["log[0].piece_bytes=4194304"])
    check("1 of 2 lanes had nothing to read" in bench.output, f"an idle lane is not told of\n{bench.output}")
    for name, steps in (("old", old["steps"]), ("new", run["steps"])):
        more = bench.train(name, job=job, worker=1, sets=["training.epochs=2"])
        check_equal(more["steps"], 2 * steps, f"{name}: steps of two epochs")
        check_equal(more["samples"]["trained"], 40000, f"{name}: records of two epochs")
        check_equal(more["labels"]["t"]["positives"] + more["labels"]["t"]["negatives"], 40000,
                    f"{name}: labels over a resume")


CASES = [numbers_as_other_tools_write_them_train_the_same_model, a_job_that_trained_nothing_is_bad_data_and_says_why,
         what_fits_nothing_is_counted_and_told, a_small_file_gives_each_lane_a_share_and_a_resume_keeps_it]

if __name__ == "__main__":
    main(CASES, "hearth-faults-reading-")
