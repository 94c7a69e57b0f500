#!/usr/bin/env python3
"""End-to-end tests of `hearth export`: trained by the real front command, proved by ONNX Runtime and a scorer that is
not ours.

Installs numpy, onnxruntime, xxhash and tritonclient from PyPI into a virtual environment under the build folder, once.
Usage: export.py --bin DIR --venv DIR CASE     (or: all)
"""
import argparse
import bisect
import csv
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import venv

import e2e
from e2e import check, check_equal

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ["numpy", "onnxruntime", "xxhash", "protobuf"]
BOUND = 1e-5  # of a probability, against the trainer's


def prepare_environment(folder):
    """The Python of a virtual environment that holds the packages; a failure to install is a failure of the test."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        for extra in (PACKAGES, ["--no-deps", "tritonclient"]):
            subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *extra], check=True)
        (folder / "complete").write_text("")
    return python


def predictions_of(path):
    """offset -> {column: text} of a predictions file; and the log files it names."""
    text = path.read_text() if path.suffix != ".zst" else subprocess.run(["zstd", "-dcq", path], check=True, text=True,
                                                                        stdout=subprocess.PIPE).stdout
    lines = [line.split("\t") for line in text.splitlines()]
    rows = [dict(zip(lines[0], line)) for line in lines[1:]]
    by_place = {(pathlib.Path(row["source"]).name, int(row["offset"])): row for row in rows}
    return by_place, sorted({row["source"] for row in rows})


class ExportBench(e2e.Bench):
    python = None

    def trained(self, name, sets=()):
        self.train(name, ps=2, worker=2, sets=["split[0].predictions=true", *sets])
        return self.root / name

    def script(self, *arguments, expect=0):
        command = [self.python, "-B", REPOSITORY / "scripts" / "score.py", *arguments]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        check(done.returncode == expect, f"score.py ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1]) if expect == 0 else None

    def leavings(self, out):
        return [path.name for path in self.root.iterdir() if path.name.startswith(out)]


def auc_change_max(rows, task, difference):
    """How much the task's AUC can change where no probability changes by more than `difference`: a positive and a
    negative can change places only where they lie within twice that."""
    scores = {"0": [], "1": []}
    for row in rows:
        if row[f"label_{task}"] in scores:
            scores[row[f"label_{task}"]].append(float(row[f"p_{task}"]))
    positives, negatives = scores["1"], sorted(scores["0"])
    reach = 2 * difference + 1e-12
    near = sum(bisect.bisect_right(negatives, p + reach) - bisect.bisect_left(negatives, p - reach) for p in positives)
    return near / (len(positives) * len(negatives)) if positives and negatives else 0


def proved(bench, name, sets):
    """Trains, exports, and scores the split's raw records with ONNX Runtime; returns the bundle."""
    run = bench.trained(name, sets)
    bundle = bench.root / f"{name}_bundle"
    bench.run("export", run, "--out", bundle)
    bench.run("verify", bundle)
    checked = bench.script(bundle, "--check")
    check_equal(checked["records"], 64, "golden records")
    split_file = next((run / "predictions").glob("*.zst"))
    trainers, sources = predictions_of(split_file)
    logs = [bench.data / source for source in sources]
    report = bench.script(bundle, "--logs", *logs, "--predictions", bench.root / f"{name}.onnx.tsv")
    own, _ = predictions_of(bench.root / f"{name}.onnx.tsv")
    check_equal(sorted(own), sorted(trainers), "records scored")
    tasks = bench.run_json(name)["tasks"]
    worst = 0.0
    for place, row in trainers.items():
        for task in tasks:
            worst = max(worst, abs(float(row[f"p_{task}"]) - float(own[place][f"p_{task}"])))
            check_equal(own[place][f"label_{task}"], row[f"label_{task}"], f"label of {task} at {place}")
    check(worst <= BOUND, f"{name}: a probability differs by {worst}")
    bench.run("score", bundle, "--logs", *logs, "--predictions", bench.root / f"{name}.cc.tsv.zst")
    table = {line.split()[0]: line.split() for line in bench.output.splitlines()[2:]}
    again, _ = predictions_of(bench.root / f"{name}.cc.tsv.zst")
    for place, row in trainers.items():
        for task in tasks:
            check_equal(again[place][f"p_{task}"], row[f"p_{task}"], f"p of {task} at {place} by hearth score")
    for task, of_split in tasks.items():
        trainer = of_split[split_file.name.removesuffix(".tsv.zst")]["auc"]
        check(
            abs(report["auc"][task] - trainer) <= auc_change_max(trainers.values(), task, worst) + 1e-9,
            f"AUC of {task}: {report['auc'][task]} by score.py, {trainer} by the trainer")
        check(
            abs(float(table[task][3]) - trainer) <= 1e-6, f"AUC of {task}: {table[task][3]} by hearth score, {trainer}")
    print(f"  {name}: {len(own)} records, largest difference of a probability {worst:.2e}", flush=True)
    return bundle


# --- cases ---


def home_agrees_with_onnx_runtime(bench):
    bench.generate()
    bundle = proved(bench, "home", [])
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, task in manifest["int8"]["tasks"].items():
        check(task["auc_float32"] is None or abs(task["auc_loss"]) < 0.01,
              f"int8 rows cost {name} {task['auc_loss']} AUC")
    check(manifest["parity"]["records"] == 64, "parity was not measured")
    # The HPS files by an independent reader, against the .npy files by numpy.
    code = "import numpy,sys; k=numpy.load(sys.argv[1]+'/keys.npy'); v=numpy.load(sys.argv[1]+'/values.npy'); " \
           "print(v.shape[0], v.shape[1], v.dtype, k.dtype, k.view('<i8').tobytes().hex(), v.tobytes().hex())"
    rows_all = 0
    for table in manifest["tables"]:
        folder = bundle / table["folder"]
        key, vector = (folder / "key").read_bytes(), (folder / "emb_vector").read_bytes()
        rows, dim = table["rows"], table["dim"]
        check_equal((len(key), len(vector)), (rows * 8, rows * dim * 4), "sizes of the HPS files")
        keys = struct.unpack(f"<{rows}q", key)
        check_equal(len(set(keys)), rows, "distinct keys")
        shown = subprocess.run([bench.python, "-c", code, folder], check=True, text=True,
                               stdout=subprocess.PIPE).stdout.split()
        check_equal(shown[:4], [str(rows), str(dim), "float32", "uint64"], "shape and dtype of the .npy files")
        check_equal((shown[4], shown[5]), (key.hex(), vector.hex()), "contents of the .npy files")
        int8 = (folder / "rows.i8").read_bytes()
        check_equal(len(int8), rows * (dim + 8), "size of rows.i8")
        for row in range(rows):
            part = int8[row * (dim + 8):(row + 1) * (dim + 8)]
            scale, bias = struct.unpack("<ff", part[dim:])
            for q, x in zip(part[:dim], struct.unpack_from(f"<{dim}f", vector, row * dim * 4)):
                check(abs(q * scale + bias - x) <= 0.51 * scale + 1e-6, f"int8 row {row} of {table['name']} is off")
        rows_all += rows
    check(rows_all > 500, f"only {rows_all} rows: the test is too easy")
    # Triton's own schema reads the configuration (the generated module alone: the client around it wants gRPC).
    code = "import sys, tritonclient; from google.protobuf import text_format; " \
           "sys.path.insert(0, tritonclient.__path__[0] + '/grpc'); import model_config_pb2 as m; " \
           "c=text_format.Parse(open(sys.argv[1]).read(), m.ModelConfig()); " \
           "print(c.name, c.backend, c.input[0].name, list(c.input[0].dims), [o.name for o in c.output])"
    model = bundle / "triton" / manifest["model"]
    done = subprocess.run([bench.python, "-c", code, model / "config.pbtxt"], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    check(done.returncode == 0, f"tritonclient does not parse config.pbtxt\n{done.stderr}")
    width = json.loads((bundle / "features.json").read_text())["width"]
    check_equal(done.stdout.strip(),
                f"{model.name} onnxruntime features [{width}] {['p_' + t for t in manifest['int8']['tasks']]}",
                "config.pbtxt as Triton reads it")


def baselines_agree_with_onnx_runtime(bench):
    bench.generate(records=3000)
    proved(bench, "mmoe", ["model.kind=MMOE"])
    proved(bench, "mmoe_home", ["model.kind=MMOE", "model.home_expert=true", "model.experts=3"])
    proved(bench, "bottom", ["model.kind=SHARED_BOTTOM"])
    proved(bench, "bottom_home", ["model.kind=SHARED_BOTTOM", "model.home_expert=true"])
    # HoME with one expert and one sub-space wherever there may be one: the graph's other branches.
    ones = ["shared_experts_1", "category_experts_1", "shared_experts_2", "category_experts_2", "gate_subspaces"]
    proved(bench, "home_ones", [f"model.{field}=1" for field in ones] + ["model.task_experts_2=2"])


def bad_input_leaves_no_half_bundle(bench):
    bench.generate(records=3000)
    run = bench.trained("run")
    bench.run("export", run, "--out", bench.root / "x", "--format", "onnx,pickle", expect=64)
    check("pickle" in bench.output, "the unknown format is not named")
    bench.run("export", run, expect=64)
    bench.run("export", bench.root / "absent", "--out", bench.root / "x", expect=66)
    bench.run("export", run, "--out", bench.root / "good")
    bench.run("export", run, "--out", bench.root / "good", expect=78)
    bench.run("score", bench.root / "good", "--logs", bench.root / "absent.csv", expect=66)
    # Partial formats are whole bundles of what was asked for.
    bench.run("export", run, "--out", bench.root / "part", "--format", "onnx,npy", "--golden", "0")
    bench.run("verify", bench.root / "part")
    check(not (bench.root / "part" / "dense.safetensors").exists(), "a format that was not asked for")
    # One flipped byte anywhere in the bundle.
    for path in sorted(p for p in (bench.root / "good").rglob("*") if p.is_file()):
        good = path.read_bytes()
        if not good:
            continue
        at = len(good) // 2
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        bench.run("verify", bench.root / "good", expect=65)
        path.write_bytes(good)
    (bench.root / "good" / "stray").write_text("x")
    bench.run("verify", bench.root / "good", expect=65)
    (bench.root / "good" / "stray").unlink()
    bench.run("verify", bench.root / "good")
    # A corrupt snapshot.
    snapshot = sorted((run / "snapshots").iterdir(), key=lambda p: int(p.name))[-1]
    dense = snapshot / "dense.safetensors"
    good = dense.read_bytes()
    dense.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    bench.run("export", snapshot, "--out", bench.root / "x", expect=65)
    # A log that is gone, in the middle of the export.
    dense.write_bytes(good)
    bench.data.rename(bench.root / "moved")
    bench.run("export", snapshot, "--out", bench.root / "x", expect=66)
    bench.run("export", snapshot, "--out", bench.root / "elsewhere", "--data-dir", bench.root / "moved")
    check_equal(bench.leavings("x"), [], "left behind by exports that failed")


def as_json_lines(bench):
    """The generated job and its logs, each record an object that holds what the side tables say of it: the user nested,
    the video's tags an array, whole numbers as numbers. Returns the folder."""
    folder = bench.root / "json"
    text = (bench.data / "job.txtpb").read_text()
    sides = []
    for block in re.findall(r"^side_table \{\n(.*?)^\}\n", text, re.S | re.M):
        fields = dict(re.findall(r'(\w+): "(.*?)"', block))
        with open(bench.data / fields["path"], newline="") as file:
            sides.append((fields["key"], {row[fields["key"]]: row for row in csv.DictReader(file)}))
    for path in bench.data.rglob("*.csv"):
        if path.name in ("user.csv", "video.csv"):
            continue
        out = (folder / path.relative_to(bench.data)).with_suffix(".jsonl")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(path, newline="") as file, open(out, "w") as lines:
            for row in csv.DictReader(file):
                for key, rows in sides:
                    row.update(rows.get(row[key], {}))
                record = {"user": {"id": int(row.pop("user_id"))}, "unread": [{"deep": [None]}]}
                for name, value in row.items():
                    record[name] = value.split(",") if name == "tag" else int(value) if value.isdigit() else value
                lines.write(json.dumps(record) + "\n")
    text = re.sub(r"^side_table \{\n.*?^\}\n", "", text, flags=re.S | re.M)
    text = re.sub(r"^ *join: .*\n", "", text, flags=re.M)
    text = re.sub(r"^( *)log \{\n", r"\1log {\n\1  format: JSON_LINES\n", text, flags=re.M).replace('.csv"', '.jsonl"')
    text = text.replace('  name: "user_id"\n', '  name: "user_id"\n  column: "user.id"\n')
    (folder / "job.txtpb").write_text(text.replace('  user: "user_id"', '  user: "user.id"'))
    return folder


def json_lines_give_the_same_model_and_agree_with_onnx_runtime(bench):
    bench.generate(records=3000)
    pieces = ["log[0].piece_bytes=4194304"]  # so that a lane's records are the same ones
    bench.train("delimited", ps=2, worker=2, sets=pieces)
    bench.data = as_json_lines(bench)
    bench.job = bench.data / "job.txtpb"
    proved(bench, "json", pieces)
    delimited, json_lines = bench.run_json("delimited"), bench.run_json("json")
    check_equal(json_lines["model_hash"], delimited["model_hash"], "model of the same records")
    check_equal(json_lines["samples"], delimited["samples"], "records")
    # A name that is in no record, and a log of another format, end before a rank is started.
    bench.train("typo", sets=["slot[0].column=user.idd"], expect=78)
    for told in ('column "user.idd" is in none of the first records', "user.id, "):
        check(told in bench.output, f"{told} is not told\n{bench.output}")
    bench.train("format", sets=["log[0].format=DELIMITED"], expect=78)
    check("it looks like JSON lines: set format: JSON_LINES" in bench.output, f"JSON is not recognised\n{bench.output}")
    bench.train("text", sets=["split[0].log.path=job.txtpb"], expect=65)
    check("is no JSON: " in bench.output and "correct log.format" in bench.output, f"text is not told\n{bench.output}")


def more_rows_take_no_more_memory(bench):
    """Rows are exported in a stream: the exporter's peak memory does not follow the table's size. Without golden
    records, for which it holds the job's side tables, as a worker does."""
    peak, size = {}, {}
    for users in (400, 150000):
        spec = e2e.SPEC.replace("user { count: 400 zipf: 0.9 }", f"user {{ count: {users} zipf: 0 }}")
        (bench.root / "spec.txtpb").write_text(spec)
        data = bench.root / f"data{users}"
        bench.run("generate", bench.root / "spec.txtpb", "--out", data, "--records", 120000)
        bench.train(f"run{users}", job=data / "job.txtpb", ps=1, worker=2,
                    sets=["table[user].dim=128", "training.batch_size=2048", "snapshot.every_steps=1000"])
        out = bench.root / f"bundle{users}"
        export = subprocess.Popen(bench.command("export", bench.root / f"run{users}", "--out", out, "--golden", 0),
                                  stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(export.pid, 0)
        export.returncode = os.waitstatus_to_exitcode(status)
        check_equal(export.returncode, 0, "exit of the export")
        peak[users] = usage.ru_maxrss * 1024
        size[users] = sum(path.stat().st_size for path in (out / "embeddings").rglob("*") if path.is_file())
    print("  " + ", ".join(f"{n} users: rows of {size[n] >> 20} MiB exported within {peak[n] >> 20} MiB" for n in peak),
          flush=True)
    check(size[150000] - size[400] > 60 << 20, f"the rows are too few to tell: {size}")
    check(peak[150000] - peak[400] < 24 << 20, f"peak memory grows with the rows: {peak}, rows {size}")


# Reads docs/EXPRESSIONS.md as tests/worker/log/expressions_page_test.cc does.
EXAMPLES = r"""
import math, sys
sys.path.insert(0, sys.argv[1] + "/scripts")
import score
page = open(sys.argv[1] + "/docs/EXPRESSIONS.md").read()
def rows(kind):
    lines = page.split("```" + kind + "\n")[1].split("```")[0].splitlines()
    ends = [line.rfind("  ") for line in lines]
    return [(line[:end].strip(), line[end + 2:]) if end >= 0 else (line, "") for line, end in zip(lines, ends)]
record = {name: value.strip('"') for name, value in rows("record")}
for text, expected in rows("examples"):
    value = score.evaluate(score.Parser(text).parse(), record.get)
    shown = "missing" if value is None else score.text_of(value)
    print("ok" if shown == expected else f"{text} = {value}, not {expected}")
"""


def the_reference_scorer_evaluates_the_examples_of_expressions(bench):
    shown = subprocess.run([bench.python, "-B", "-c", EXAMPLES, REPOSITORY], check=True, text=True,
                           stdout=subprocess.PIPE).stdout
    check(
        shown.count("ok\n") > 40 and set(shown.split()) == {"ok"},
        f"score.py differs from docs/EXPRESSIONS.md\n{shown}")


CASES = [
    the_reference_scorer_evaluates_the_examples_of_expressions, home_agrees_with_onnx_runtime,
    baselines_agree_with_onnx_runtime, json_lines_give_the_same_model_and_agree_with_onnx_runtime,
    bad_input_leaves_no_half_bundle, more_rows_take_no_more_memory
]


def main(cases=CASES, prefix="hearth_export_", bench=ExportBench):
    """As e2e.main, with the environment that these cases need. Also for serving.py."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--venv", required=True, type=pathlib.Path)
    arguments, sys.argv[1:] = parser.parse_known_args()
    bench.python = prepare_environment(arguments.venv.resolve())
    e2e.main(cases, prefix, bench)


if __name__ == "__main__":
    main()
