#!/usr/bin/env python3
"""End-to-end tests of what is read beside a run and behind it: snapshots that a run removes, the scorers on odd texts.

Usage: serving.py --bin DIR --venv DIR CASE     (or: all). The virtual environment is export.py's.
"""
import json
import pathlib
import random
import re
import time

import e2e
import export
from e2e import check, check_equal

READ_S = 6  # beside a run that removes a snapshot every few milliseconds

JOB = """
name: "small" data_dir: "." seed: 3
log { name: "train" path: "log.csv" }
%s
task { name: "click" category: "c" label: "click" }
table { name: "id" dim: 4 memory_rows_max: 100000 }
model { hidden_1: 8 hidden_2: 8 width_1: 8 width_2: 8 gate_rank_1: 2 gate_rank_2: 2 tower_hidden: 4 }
"""


class Bench(export.ExportBench):
    def small(self, text, job):
        """A job of our own beside its log."""
        self.data.mkdir()
        (self.data / "log.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        pathlib.Path(self.job).write_text(job.replace('data_dir: "."', f'data_dir: "{self.data}"'))


# --- cases ---


def readers_beside_a_run_find_their_snapshot(bench):
    """keep: 1, and a snapshot every second step: whoever reads finds a whole one, and reads it to its end."""
    lines = "".join(f"u{i % 997},i{i % 3001},{i % 2}\n" for i in range(40000))
    slots = 'slot { name: "user" table: "id" } slot { name: "item" table: "id" }'
    bench.small("user,item,click\n" + lines, JOB % slots +
                'training { batch_size: 100 lanes: 1 epochs: 1000 } snapshot { every_steps: 2 keep: 1 }')
    (bench.root / "test.csv").write_text("user,item,click\n" + lines[:4000])
    process = bench.start("run")
    bench.wait_for_step("run", 2, process)
    run, first, read = bench.root / "run", bench.newest_step("run"), 0
    until = time.monotonic() + READ_S
    while time.monotonic() < until:
        bench.run("inspect", run)
        bench.run("verify", run)
        bench.run("export", run, "--out", bench.root / f"b{read}", "--format", "hps", "--golden", 0)
        if read % 3 == 0:
            bench.run("eval", bench.job, "--snapshot", run, "--logs", bench.root / "test.csv")
        read += 1
    removed = (bench.newest_step("run") - first) // 2
    check(removed > 20, f"only {removed} snapshots were removed beside {read} readings: the test is too easy")
    check(len(list((run / "snapshots").glob("*/MANIFEST"))) <= 1 + 4, "readers that have gone hold snapshots")
    process.terminate()
    check_equal(bench.end(process), 143, "exit code after SIGTERM")


ODD = ["", "0", "-0", "1e-400", "-1e-400", "4.9e-324", "1e400", "inf", "-inf", "nan", "nan(x)", "+1", " 1", "1 ", "\t2",
       "0x10", "1_0", "1e5", "1E5", ".5", "5.", "1.5.2", "1e", "٣", "9007199254740993", "18446744073709551615",
       "123456789012345678901234567890",
       "1e22", "1.0", "0.1", "-1.5e300", "3.5e38", "true", "caf\xe9"]


def scorers_read_odd_texts_as_the_trainer_does(bench):
    """Numbers of every spelling, bytes that are no UTF-8, quotes that do not fit: in eval, hearth score, score.py."""
    choice = random.Random(6)
    lines = [f"{ODD[i % len(ODD)]},\"u{i % 13}\",{choice.randrange(2)}\n" for i in range(1200)]
    lines[100], lines[200], lines[300] = '0.5,"u1"x,1\n', '0.5,"u\n1",1\n', "1,2\n"
    lines[400], lines[500] = "\n", '0.25,"u""3",0\r\n'
    # The last text in Latin-1, the others in UTF-8.
    text = b"x,user,click\n" + b"".join(line.encode("latin-1" if "\xe9" in line else "utf-8") for line in lines)
    slots = 'slot { name: "user" table: "id" } ' \
            'slot { name: "b" column: "x" table: "id" kind: BUCKET missing_value: "caf\\351" } ' \
            'slot { name: "t" column: "x" table: "id" } slot { name: "v" value: "x" table: "id" } ' \
            'slot { name: "w" value: "x * 3 / 7" table: "id" } ' \
            'dense { name: "x" value: "max(min(x, 5), -5)" } ' \
            'dense { name: "l" value: "x" transform: LOG1P missing: -1 } ' \
            'task { name: "odd" category: "c" label: "x" } task { name: "cmp" category: "c" label: "x > 0" }'
    bench.small(text, JOB % slots + 'split { name: "t" log { name: "t" path: "log.csv" } predictions: true }')
    for multiline in ("false", "true"):
        name = f"run_{multiline}"
        bench.train(name, sets=["training.batch_size=50", "training.lanes=1", "limits.bad_records_max_fraction=0.1",
                                f"log[0].multiline_records={multiline}", f"split[0].log.multiline_records={multiline}"])
        bundle = bench.root / f"bundle_{multiline}"
        bench.run("export", bench.root / name, "--out", bundle)
        manifest = json.loads((bundle / "manifest.json").read_text())
        check_equal(manifest["graph_parity"]["records"], 64, "golden records of which the graph was run")
        check_equal(bench.script(bundle, "--check")["sign_faults"], 0, "golden records that score.py reads otherwise")
        trainers, _ = export.predictions_of(bench.root / name / "predictions" / "t.tsv.zst")
        bench.script(bundle, "--logs", bench.data / "log.csv", "--predictions", bench.root / "py.tsv")
        bench.run("score", bundle, "--logs", bench.data / "log.csv", "--predictions", bench.root / "cc.tsv.zst")
        ledger = re.search(r"read (\d+) = scored (\d+) \+ rejected (\d+) \+ filtered 0", bench.output)
        check(ledger is not None, f"no ledger in\n{bench.output}")
        check_equal(int(ledger[2]), len(trainers), "records scored by hearth score")
        check(int(ledger[3]) >= 2, f"rejected: {ledger[3]}")
        check("rejected, for example: " in bench.output, "no example of a rejected record")
        for scorer, path in (("score.py", bench.root / "py.tsv"), ("hearth score", bench.root / "cc.tsv.zst")):
            own, _ = export.predictions_of(path)
            check_equal(sorted(own), sorted(trainers), f"records that {scorer} scored")
            for place, row in trainers.items():
                for task in ("click", "odd", "cmp"):
                    what = f"of {task} by {scorer} of the record {text[place[1]:].split(bytes([10]), 1)[0]!r}"
                    check_equal(own[place][f"label_{task}"], row[f"label_{task}"], f"label {what}")
                    difference = abs(float(own[place][f"p_{task}"]) - float(row[f"p_{task}"]))
                    check(difference <= export.BOUND, f"another p {what}")


def hearth_score_has_the_budget_and_the_bound_of_an_evaluation(bench):
    lines = "".join(f"u{i % 97},{i % 2}\n" for i in range(3000))
    bench.small("user,click\n" + lines, JOB % 'slot { name: "user" table: "id" }' +
                'split { name: "t" log { name: "t" path: "log.csv" } records_max: 4000 }')
    bench.train("run", sets=["training.batch_size=100"])
    bundle = bench.root / "bundle"
    bench.run("export", bench.root / "run", "--out", bundle)
    (bench.root / "bad.csv").write_text("user,click\n" + lines + "one field\n" * 200)
    bench.run("score", bundle, "--logs", bench.root / "bad.csv", expect=65)
    check("200 of 3200 records are bad" in bench.output and "bad.csv" in bench.output, f"not told:\n{bench.output}")
    (bench.root / "long.csv").write_text("user,click\n" + lines + lines)
    bench.run("score", bundle, "--logs", bench.root / "long.csv", expect=78)
    check("records_max = 4000" in bench.output, f"not told:\n{bench.output}")


CASES = [readers_beside_a_run_find_their_snapshot, scorers_read_odd_texts_as_the_trainer_does,
         hearth_score_has_the_budget_and_the_bound_of_an_evaluation]


if __name__ == "__main__":
    export.main(CASES, "hearth_serving_", Bench)
