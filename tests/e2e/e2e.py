#!/usr/bin/env python3
"""End-to-end tests: the real front command, real ranks under mpirun, real kills. One case a run; standard library only.

Usage: e2e.py --bin DIR CASE     (or: all)
"""
import argparse
import fcntl
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

DEADLINE_S = 400  # of one command: a guard against one that hangs, also on a machine that does other work

SPEC = """
name: "e2e" seed: 11 records: 6000 test_records: 1500 part_records: 2500
user { count: 400 zipf: 0.9 } video { count: 600 zipf: 0.9 } author { count: 60 } tag { count: 30 }
task { name: "click" category: "watch" positive_rate: 0.4 }
task { name: "long_view" category: "watch" positive_rate: 0.25 }
task { name: "like" category: "inter" positive_rate: 0.05 }
memory_rows_max: 150   # small enough that rows spill
job {
  training { batch_size: 128 lanes: 4 shards: 8 }
  model { hidden_1: 8 hidden_2: 8 width_1: 8 width_2: 8 gate_rank_1: 2 gate_rank_2: 2 tower_hidden: 4 }
  snapshot { every_steps: 12 keep: 3 verify_hash: true }
}
"""
RECORDS, TEST_RECORDS = 6000, 1500
# docs/FORMATS.md, "Logs of the roles"
LOG_LINE = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} (info|warning|error|critical) (scheduler|ps|worker)-\d+ '
                      r'event=[a-z_]+( [a-z0-9_]+=("([^"\\]|\\.)*"|[^\s"]+))*')


class Failure(Exception):
    pass


def check(condition, text):
    if not condition:
        raise Failure(text)


def check_equal(actual, expected, text):
    check(actual == expected, f"{text}: expected {expected!r}, got {actual!r}")


class Bench:
    """A folder of its own, the programs, and what they print."""

    def __init__(self, bin_dir, root):
        self.hearth = str(pathlib.Path(bin_dir) / "hearth")
        self.root = pathlib.Path(root)
        self.data = self.root / "data"
        self.job = str(self.data / "job.txtpb")
        self.output = ""  # of the newest command

    def command(self, *arguments):
        return [self.hearth, *map(str, arguments)]

    def run(self, *arguments, expect=0):
        started = time.monotonic()
        process = subprocess.Popen(self.command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        try:
            self.output = process.communicate(timeout=DEADLINE_S)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            raise Failure(f"hangs: {' '.join(self.command(*arguments))}")
        line = " ".join(map(str, arguments)).replace(str(self.root), "$T")
        print(f"  [{time.monotonic() - started:5.1f} s] exit {process.returncode}: hearth {line}", flush=True)
        check(process.returncode == expect,
              f"expected exit {expect}, got {process.returncode}\n--- output\n{self.output}\n--- logs\n{self.logs()}")
        return self.output

    def logs(self):
        """The last lines of every role's log of every run here."""
        text = ""
        for path in sorted(self.root.glob("*/logs/*.log")):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            text += f"{path.relative_to(self.root)}:\n  " + "\n  ".join(lines) + "\n"
        return text

    def check_logs(self):
        """Every line of every role's log obeys the one grammar; a kill may have cut the last one."""
        for path in self.root.glob("*/logs/*-*.log"):
            for line in path.read_text().split("\n")[:-1]:
                check(LOG_LINE.fullmatch(line), f"{path.relative_to(self.root)} has a line that is no event: {line}")

    def generate(self, records=RECORDS, name="data"):
        (self.root / "spec.txtpb").write_text(SPEC)
        self.run("generate", self.root / "spec.txtpb", "--out", self.root / name, "--records", records)

    def train_arguments(self, name, *, ps=1, worker=1, sets=(), job=None):
        arguments = ["train", job or self.job, "--out", self.root / name, "--np-ps", ps, "--np-worker", worker]
        for one in sets:
            arguments += ["--set", one]
        return arguments

    def train(self, name, *, expect=0, **options):
        self.run(*self.train_arguments(name, **options), expect=expect)
        return self.run_json(name) if expect in (0, 75) else None

    def run_json(self, name):
        return json.loads((self.root / name / "run.json").read_text())

    def start(self, name, *extra, **options):
        """A run in the background, in a log file of its own."""
        out = open(self.root / f"{name}.out", "w")
        return subprocess.Popen(self.command(*self.train_arguments(name, **options), *extra), stdin=subprocess.DEVNULL,
                                stdout=out, stderr=subprocess.STDOUT)

    def newest_step(self, name):
        steps = [
            int(p.parent.name) for p in (self.root / name / "snapshots").glob("*/MANIFEST") if p.parent.name.isdigit()
        ]
        return max(steps, default=-1)

    def wait_for_step(self, name, step, process):
        """Returns once a snapshot at or past `step` is committed."""
        deadline = time.monotonic() + DEADLINE_S
        while self.newest_step(name) < step:
            check(
                process.poll() is None,
                f"the run ended with {process.returncode} before step {step}; it is too short for "
                f"this test\n{(self.root / f'{name}.out').read_text()}\n{self.logs()}")
            check(time.monotonic() < deadline, f"no snapshot at step {step}\n{self.logs()}")
            time.sleep(0.002)

    def pids(self, program, name):
        """Processes of the run in folder `name` whose executable is called `program`."""
        folder = str((self.root / name).resolve())
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
            except OSError:
                continue
            words = [os.fsdecode(argument) for argument in arguments]
            if words and pathlib.Path(words[0]).name == program and words[-1] == folder:
                found.append(int(entry.name))
        return sorted(found)

    def end(self, process):
        try:
            return process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            raise Failure(f"a run hangs\n{self.logs()}")


def check_ledger(run, read):
    samples = run["samples"]
    check_equal(samples["read"], read, "samples read")
    check_equal(samples["trained"] + samples["rejected"] + samples["filtered"], samples["read"],
                "trained + rejected + filtered")


def check_one_token(pids):
    """Every rank was given the same token in its environment, and no process of the host has it on its command line."""
    tokens = set()
    for pid in pids:
        given = dict(line.split(b"=", 1) for line in pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in line)
        tokens.add(given.get(b"HEARTH_JOB_TOKEN", b"none"))
    check(len(tokens) == 1 and len(min(tokens)) == 32, f"{len(tokens)} tokens for {len(pids)} ranks, or none")
    for entry in pathlib.Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        check(min(tokens) not in line, f"process {entry.name} has the token on its command line")


def check_finished(run, records=RECORDS):
    check_equal(run["status"], "finished", "status")
    check_equal(len(run["model_hash"]), 16, "length of the model hash")
    check_ledger(run, records)
    check_equal(run["samples"]["trained"], records, "samples trained")


# --- cases ---


def same_job_twice_gives_the_same_hash(bench):
    bench.generate()
    first = bench.train("a", ps=2, worker=2)
    second = bench.train("b", ps=2, worker=2)
    check_finished(first)
    check_equal(sorted(path.name for path in (bench.root / "a" / "logs").iterdir()),
                ["ps-0.log", "ps-1.log", "scheduler-0.log", "worker-0.log", "worker-1.log"], "logs")
    check_equal(second["model_hash"], first["model_hash"], "hash of the same job again")
    check_equal(second["tasks"], first["tasks"], "metrics of the same job again")
    other = bench.train("c", ps=2, worker=2, sets=["seed=12"])
    check(other["model_hash"] != first["model_hash"], "another seed gave the same hash")
    check(any(table["rows_spilled"] > 0 for table in first["tables"].values()),
          "no row was ever spilled: the test is too easy")
    check(first["snapshots"] >= 4, f"only {first['snapshots']} snapshots")


def workers_do_not_change_the_hash(bench):
    bench.generate()
    runs = [bench.train(f"w{worker}", ps=2, worker=worker) for worker in (1, 2, 4)]
    for run in runs:
        check_finished(run)
        check_equal(run["model_hash"], runs[0]["model_hash"], "hash on other workers")
        check_equal(run["tasks"], runs[0]["tasks"], "metrics on other workers")


def servers_do_not_change_the_hash(bench):
    bench.generate()
    runs = [bench.train(f"p{ps}", ps=ps, worker=2) for ps in (1, 2, 3)]
    for run in runs:
        check_finished(run)
        check_equal(run["model_hash"], runs[0]["model_hash"], "hash on other servers")


BY_TIME = ["log[0].time_ms=time_ms", "table[user].expire_after_hours=1", "table[user].admission.count_min=2",
           "table[video].expire_after_hours=2", "table[video].admission.count_min=2",
           "table[video].admission.counter=BLOOM", "table[video].admission.bloom_counters=500"]


def rows_expire_by_the_logs_time_on_any_number_of_processes(bench):
    bench.generate()
    runs = [bench.train(f"t{ps}_{worker}", ps=ps, worker=worker, sets=BY_TIME) for ps, worker in ((1, 1), (2, 2), (3, 4))]
    for run in runs:
        check_finished(run)
        check_equal(run["model_hash"], runs[0]["model_hash"], "hash on other processes")
        for table in ("user", "video"):
            check(run["tables"][table]["rows_expired"] > 0, f"no row of {table} expired at all: the test is too easy")
            check_equal(run["tables"][table]["log_time_s"], runs[0]["tables"][table]["log_time_s"], "the clock")
    bench.run("verify", bench.root / "t3_4")

    # Killed, stopped and resumed on other numbers: the clock goes on where a snapshot left it.
    process = bench.start("killed", "--max-restarts", "3", ps=2, worker=2, sets=BY_TIME)
    bench.wait_for_step("killed", 24, process)
    os.kill(bench.pids("hearth-ps", "killed")[-1], signal.SIGKILL)
    check_equal(bench.end(process), 0, "exit code after a kill")
    check_equal(bench.run_json("killed")["model_hash"], runs[0]["model_hash"], "hash after a kill")
    bench.train("halves", ps=2, worker=1, sets=BY_TIME + ["training.steps_max=30"])
    resumed = bench.train("halves", ps=1, worker=3, sets=BY_TIME)
    check_equal(resumed["model_hash"], runs[0]["model_hash"], "hash resumed on another server")

    # From steps to the log's time and to other hours, on the way; the same on other numbers.
    changed = []
    for ps, worker, other_ps in ((1, 2, 1), (2, 1, 3)):
        name = f"changed{ps}"
        by_steps = [one.replace("expire_after_hours", "expire_after_steps").replace("=1", "=7") for one in BY_TIME]
        bench.train(name, ps=ps, worker=worker, sets=by_steps)
        sets = BY_TIME + ["training.epochs=2"]
        bench.train(name, ps=other_ps, worker=worker, sets=sets + ["training.steps_max=110"])
        changed.append(bench.train(name, ps=ps, worker=worker, sets=sets + ["table[user].expire_after_hours=3"]))
        bench.run("verify", bench.root / name)
    check_equal(changed[1]["model_hash"], changed[0]["model_hash"], "hash of a job whose rule changed")

    bench.train("no_time", ps=1, worker=1, sets=BY_TIME[1:], expect=78)
    check("log[0].time_ms: is empty" in bench.output, f"which field is missing in\n{bench.output}")
    bench.train("no_unit", ps=1, worker=1, sets=BY_TIME + ["log[0].time_ms=time_ms / 1000"], expect=65)
    check("is no time of the years 2000 to 2099 in milliseconds" in bench.output, f"the unit in\n{bench.output}")


def staleness_is_exact_on_any_number_of_processes(bench):
    bench.generate(records=4000)
    hashes = {}
    for staleness in (0, 1, 3):
        runs = [
            bench.train(f"k{staleness}_{ps}_{worker}", ps=ps, worker=worker, sets=[f"training.staleness={staleness}"])
            for ps, worker in ((1, 1), (2, 2), (3, 4))
        ]
        for run in runs:
            check_finished(run, 4000)
            check_equal(run["staleness"], staleness, "staleness in run.json")
            check(run["staleness_max_seen"] <= staleness,
                  f"staleness {run['staleness_max_seen']} seen, bound {staleness}")
            check_equal(run["model_hash"], runs[0]["model_hash"], f"hash at staleness {staleness}")
        hashes[staleness] = runs[0]["model_hash"]
    check_equal(len(set(hashes.values())), 3, "different hashes for different staleness")


LONG = 24000  # records of a run that is interrupted: long enough to be hit in its middle


def killed_ranks_are_restarted_and_nothing_is_lost(bench):
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=2, worker=2, sets=["training.staleness=1"])
    process = bench.start("killed", "--max-restarts", "10", ps=2, worker=2, sets=["training.staleness=1"])
    step = 0
    for program in ("hearth-worker", "hearth-ps", "hearth-scheduler", "mpirun"):
        bench.wait_for_step("killed", step, process)
        pids = bench.pids(program, "killed")
        check(pids, f"no {program} is running")
        before = bench.newest_step("killed")
        os.kill(pids[-1], signal.SIGKILL)
        print(f"  killed {program} after step {before}", flush=True)
        step = before + 24
    code = bench.end(process)
    output = (bench.root / "killed.out").read_text()
    check_equal(code, 0, f"exit code of the killed run\n{output}\n{bench.logs()}\nexit code")
    run = bench.run_json("killed")
    check_finished(run, LONG)
    check_equal(output.count("; restart "), 4, f"lines about restarts in\n{output}\nnumber")
    check_equal(run["restarts"], 4, "restarts in run.json")
    check_equal(run["model_hash"], whole["model_hash"], "hash after a kill of each role")
    check_equal(run["samples"], whole["samples"], "ledger after a kill of each role")
    for program in ("hearth-worker", "hearth-ps", "hearth-scheduler"):
        check_equal(bench.pids(program, "killed"), [], f"left-over {program}")


def sigusr1_saves_and_other_numbers_resume(bench):
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=2, worker=2)
    process = bench.start("saved", ps=2, worker=2)
    bench.wait_for_step("saved", 24, process)
    process.send_signal(signal.SIGUSR1)
    check_equal(bench.end(process), 75,
                f"exit code after SIGUSR1\n{(bench.root / 'saved.out').read_text()}\n{bench.logs()}\nexit code")
    run = bench.run_json("saved")
    check_equal(run["status"], "saved", "status after SIGUSR1")
    check(0 < run["samples"]["trained"] < LONG, "the run was over before the signal")
    check_equal(bench.newest_step("saved"), run["steps"], "the newest snapshot's step")
    resumed = bench.train("saved", ps=3, worker=1)
    check_finished(resumed, LONG)
    check_equal(resumed["model_hash"], whole["model_hash"], "hash resumed on 3 servers and 1 worker")

    process = bench.start("stopped", ps=1, worker=2)
    bench.wait_for_step("stopped", 12, process)
    process.send_signal(signal.SIGTERM)
    check_equal(bench.end(process), 128 + signal.SIGTERM, "exit code after SIGTERM")
    check_equal(bench.pids("hearth-worker", "stopped"), [], "left-over workers")
    check_equal(bench.train("stopped", ps=1, worker=4)["model_hash"], whole["model_hash"], "hash resumed after SIGTERM")


def auc_of(pairs):
    """Exact, ties one half; None with one class."""
    pairs.sort()
    positives = negatives = wins = at = 0
    while at < len(pairs):
        tied = [0, 0]
        score = pairs[at][0]
        while at < len(pairs) and pairs[at][0] == score:
            tied[pairs[at][1]] += 1
            at += 1
        wins += tied[1] * (negatives + tied[0] / 2)
        positives += tied[1]
        negatives += tied[0]
    return wins / (positives * negatives) if positives and negatives else None


def read_predictions(path):
    text = subprocess.run(["zstd", "-dcq", str(path)], check=True, stdout=subprocess.PIPE, text=True).stdout
    header, *lines = text.splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"))) for line in lines]


def the_ledger_and_the_metrics_add_up(bench):
    bench.generate(records=LONG)
    run = bench.train("run", ps=2, worker=2, sets=["training.epochs=2"])
    check_equal(run["status"], "finished", "status")
    check_ledger(run, 2 * LONG)
    check_equal(run["ranks"], {"ps": 2, "worker": 2}, "ranks")
    check_equal(run["lanes"], 4, "lanes")
    bayes = json.loads((bench.data / "bayes.json").read_text())
    test_records = bayes["records"]["test"]
    rows = read_predictions(bench.root / "run" / "predictions" / "test.tsv.zst")
    check_equal(len(rows), test_records, "lines of predictions")
    for task in ("click", "long_view", "like"):
        figures = run["tasks"][task]["test"]
        check_equal(figures["samples"], test_records, f"samples of {task}")
        auc = auc_of([(float(row[f"p_{task}"]), int(float(row[f"label_{task}"]))) for row in rows])
        check(
            abs(auc - figures["auc"]) < 1e-4, f"AUC of {task}: {figures['auc']} in run.json, {auc} by its predictions")
        check_equal(figures["positives"], sum(float(row[f"label_{task}"]) != 0 for row in rows), f"positives of {task}")
        check_equal(bayes["tasks"][task]["positives"], figures["positives"], f"positives of {task} by the generator")
        check(auc < bayes["tasks"][task]["auc"] + 0.02, f"{task}: AUC {auc} above the best reachable")
    click = run["tasks"]["click"]["test"]["auc"]
    check(click > 0.6, f"click AUC {click}: nothing was learned")
    newest = bench.root / "run" / "snapshots" / str(bench.newest_step("run"))
    shown = json.loads(bench.run("inspect", newest, "--json"))
    check_equal(shown["model_hash"], run["model_hash"], "hash by inspect")
    check_equal(shown["samples"], run["samples"], "ledger by inspect")
    check_equal({name: table["rows"] for name, table in shown["tables"].items()},
                {name: table["rows"] for name, table in run["tables"].items()}, "rows by inspect")
    bench.run("verify", newest)


def tree_of(folder):
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def eval_agrees_with_the_run_and_leaves_it_alone(bench):
    bench.generate()
    run = bench.train("run", ps=2, worker=2)
    before = tree_of(bench.root / "run")
    predictions = bench.root / "predictions.tsv"
    table = bench.run("eval", bench.job, "--snapshot", bench.root / "run", "--logs", bench.data / "test.csv",
                      "--predictions", predictions, "--np-ps", 1, "--np-worker", 1)
    check_equal(tree_of(bench.root / "run"), before, "files of the evaluated run")
    for task in ("click", "long_view", "like"):
        auc = f"{run['tasks'][task]['test']['auc']:.4f}"
        line = next((line for line in table.splitlines() if line.startswith(task)), "")
        check(auc in line.split(), f"{task}: the run's AUC {auc} is not in {line!r}")
    lines = predictions.read_text().splitlines()
    check_equal(len(lines), TEST_RECORDS + 1, "lines of predictions")
    packed = bench.root / "predictions.tsv.zst"
    bench.run("eval", bench.job, "--snapshot", bench.root / "run" / "snapshots" / str(bench.newest_step("run")),
              "--logs", bench.data / "test.csv", "--predictions", packed, "--np-ps", 3, "--np-worker", 4)
    ours = [(row["p_click"], row["p_like"]) for row in read_predictions(packed)]
    theirs = [
        (row["p_click"], row["p_like"]) for row in read_predictions(bench.root / "run" / "predictions" / "test.tsv.zst")
    ]
    check_equal(ours, theirs, "predictions on other numbers of processes")


def bad_records_are_set_aside_and_too_many_stop_the_job(bench):
    bench.generate()
    part = bench.data / "train" / "part-0000.csv"
    lines = part.read_text().splitlines()
    lines[100] = "only,three,fields"
    lines[2000] = lines[2000] + ",one,field,too,many"
    part.write_text("\n".join(lines) + "\n")
    run = bench.train("some", ps=1, worker=2)
    check_equal(run["status"], "finished", "status")
    check_ledger(run, RECORDS)
    check_equal(run["samples"]["rejected"], 2, "rejected records")
    dead = "".join(p.read_text() for p in (bench.root / "some" / "dead-letter").rglob("*") if p.is_file())
    check_equal(len(dead.splitlines()), 2, f"dead letters in\n{dead}\nnumber")
    check(f"part-0000.csv\t{sum(len(line) + 1 for line in lines[:100])}\t" in dead and "3 fields" in dead,
          f"source, offset or reason is missing in\n{dead}")

    for at in range(500, 1500):
        lines[at] = "broken"
    part.write_text("\n".join(lines) + "\n")
    bench.train("many", ps=1, worker=2, expect=65)
    check_equal(bench.run_json("many")["status"], "failed", "status past the budget")
    check_equal(bench.run_json("many")["exit"]["code"], 65, "exit code in run.json")


def free_port_block(size):
    """The first of `size` ports in a row that nobody listens on."""
    for first in range(21000, 30000, size):
        try:
            for port in range(first, first + size):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise Failure("no free ports")


def every_rank_serves_its_figures(bench):
    bench.generate()
    first = free_port_block(8)
    process = bench.start("run", ps=1, worker=2, sets=[f"metrics.prometheus_port={first}", "training.epochs=1000"])
    awaited = {0: "hearth_job_records_total", 1: 'kind="push"', 2: 'fate="trained"',
               3: 'fate="trained"'}  # above 0, by rank
    deadline = time.monotonic() + DEADLINE_S
    while awaited:
        check(process.poll() is None and time.monotonic() < deadline,
              f"no figures of ranks {sorted(awaited)}\n{bench.logs()}")
        for rank, name in list(awaited.items()):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{first + rank}/metrics", timeout=10) as page:
                    lines = page.read().decode().splitlines()
            except OSError:
                continue
            if any(name in line and not line.startswith("#") and float(line.split()[-1]) > 0 for line in lines):
                del awaited[rank]
        time.sleep(0.05)
    process.terminate()
    check_equal(process.wait(DEADLINE_S), 143, "exit code after SIGTERM")


def bad_input_is_told_with_its_exit_code(bench):
    bench.generate(records=1000)

    def refuse(code, *texts, **options):
        out = bench.root / "refused"
        shutil.rmtree(out, ignore_errors=True)
        bench.train("refused", expect=code, **options)
        for text in texts:
            check(text in bench.output, f"{text!r} is not in\n{bench.output}")

    refuse(66, "absent.csv", sets=["log[0].path=absent.csv"])
    refuse(78, "no_such_column", sets=["slot[0].column=no_such_column"])
    refuse(78, "training.batch_size", "model.hidden_1", "table[0]",
           sets=["training.batch_size=0", "model.hidden_1=0", "table[0].dim=0"])
    refuse(78, "--np-worker", "lanes", worker=5)
    refuse(78, "no field", sets=["training.stalenes=1"])
    if not pathlib.Path("/dev/nvidia0").exists():
        refuse(78, "training.device is CUDA", "worker 0", worker=2, sets=["training.device=CUDA"])
        check(bench.output.count("hearth-worker: ") == 1, f"the error is told more than once:\n{bench.output}")

    packed = gzip.compress((bench.data / "train" / "part-0000.csv").read_bytes())
    (bench.data / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    refuse(65, "cut.csv.gz", worker=2, sets=["log[0].path=cut.csv.gz"])

    for rank in range(3):  # the scheduler's, the server's, the worker's
        first = free_port_block(8)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", first + rank))
            taken.listen()
            refuse(74, f"port {first + rank} ", sets=[f"metrics.prometheus_port={first}"])

    bench.train("run", sets=["training.lanes=2"])
    saved = bench.newest_step("run")
    bench.train("run", expect=78, sets=["training.lanes=2", "table[user].dim=8"])
    check("table[0].dim" in bench.output, f"the field that differs is not named in\n{bench.output}")
    bench.train("run", expect=78, worker=3, sets=["training.lanes=2"])
    check_equal(bench.newest_step("run"), saved, "the newest snapshot after refusals")
    bench.run("verify", bench.root / "run")
    bench.run("train", bench.job, "--out", bench.root / "run", "--fresh", expect=78)
    bench.run("train", bench.job, expect=64)
    bench.run("verify", bench.root / "nowhere", expect=66)
    bench.run("eval", bench.job, "--snapshot", bench.root / "run", "--logs", bench.root / "absent.csv", "--set",
              "training.lanes=2", expect=66)


def flip(path):
    """One bit in the middle of a file, the length as it was."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # snapshots share files by hard links: the others keep theirs
    path.write_bytes(data)


def whole_and_half(bench, name, **options):
    """run.json of a whole run; another of the same job, called `name`, is saved on its way."""
    bench.generate(records=LONG)
    whole = bench.train("whole", **options)
    process = bench.start(name, **options)
    bench.wait_for_step(name, 36, process)
    process.send_signal(signal.SIGUSR1)
    check_equal(bench.end(process), 75, "exit code after SIGUSR1")
    return whole


def a_corrupt_snapshot_is_found_and_passed_over(bench):
    whole = whole_and_half(bench, "hurt", ps=2, worker=2)
    newest = bench.root / "hurt" / "snapshots" / str(bench.newest_step("hurt"))
    bench.run("verify", newest)
    victim = newest / "dense.safetensors"
    flip(victim)
    bench.run("verify", newest, expect=65)
    check(str(victim.name) in bench.output, f"{victim.name} is not named in\n{bench.output}")
    tables = sorted((p for p in newest.rglob("*.sst")), key=lambda p: p.stat().st_size)
    check(tables, "the snapshot holds no table file")
    run = bench.train("hurt", ps=2, worker=2)
    check("passed over" in bench.output, f"the corrupt snapshot is not told of in\n{bench.output}")
    check_equal(run["model_hash"], whole["model_hash"], "hash after a fall-back")
    check_finished(run, LONG)

    last = bench.root / "hurt" / "snapshots" / str(bench.newest_step("hurt"))
    manifest = last / "MANIFEST"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    bench.run("verify", last, expect=65)
    check("MANIFEST" in bench.output, f"MANIFEST is not named in\n{bench.output}")


def damaged_rows_send_a_run_back_to_the_newest_whole_snapshot(bench):
    whole = whole_and_half(bench, "hurt", ps=1, worker=2)
    step = bench.newest_step("hurt")
    newest = bench.root / "hurt" / "snapshots" / str(step)
    older = {p.stat().st_ino for p in newest.parent.rglob("*.sst") if newest not in p.parents}
    tables = [p for p in newest.rglob("*.sst") if p.stat().st_ino not in older]
    check(tables, "the newest snapshot has no table file of its own")
    flip(max(tables, key=lambda p: p.stat().st_size))
    run = bench.train("hurt", ps=1, worker=2)  # starts from it, meets it, and goes back by itself
    check("restart 1" in bench.output and "passed over" not in bench.output.split("restart 1")[0],
          f"the run was to start from rows it had not read yet:\n{bench.output}")
    check((newest.parent / f"{step}.corrupt").exists(), "the damaged snapshot was not set aside")
    check(not (newest.parent / "SUSPECT").exists(), "the suspicion was not lifted")
    check_equal(run["model_hash"], whole["model_hash"], "hash after damaged rows")
    check_finished(run, LONG)


def rows_live_on_a_disk_of_their_own(bench):
    """/dev/shm is one: nothing there can be linked into a snapshot."""
    shm = pathlib.Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == bench.root.stat().st_dev:
        print("  skipped: /dev/shm is no file system of its own here", flush=True)
        return
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=2, worker=2)
    with tempfile.TemporaryDirectory(dir=shm) as live:
        process = bench.start("apart", "--live", live, ps=2, worker=2)
        bench.wait_for_step("apart", 36, process)
        check_equal(len(list(pathlib.Path(live).glob("apart-*/ps-*/CURRENT"))), 2, "working stores under --live")
        check(not list((bench.root / "apart" / "live").glob("ps-*")), "a server works in the run's folder")
        os.kill(bench.pids("hearth-ps", "apart")[0], signal.SIGKILL)
        check_equal(bench.end(process), 0, "exit code after a killed server")
        check_equal(list(pathlib.Path(live).iterdir()), [], "what is left under --live at the end")
    run = bench.run_json("apart")
    check_equal(run["model_hash"], whole["model_hash"], "hash with rows on a disk of their own")
    check_finished(run, LONG)
    bench.run("verify", bench.root / "apart")


def a_working_store_in_use_is_refused_and_free_once_its_holder_is_gone(bench):
    """The holder is this process, which takes the lock of a server that is killed."""
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=2, worker=2)
    with tempfile.TemporaryDirectory() as live:
        process = bench.start("apart", "--live", live, ps=2, worker=2)
        bench.wait_for_step("apart", 24, process)
        [path] = pathlib.Path(live).glob("apart-*/ps-0.lock")
        with open(path, "r+") as lock:
            owner = int(lock.read().split()[1])
            check(owner in bench.pids("hearth-ps", "apart"), f"{path} names process {owner}, which is no server")
            os.kill(owner, signal.SIGKILL)
            fcntl.flock(lock, fcntl.LOCK_EX)  # before the job starts again
            step = bench.newest_step("apart")
            check_equal(bench.end(process), 78, "exit code where a working store is in use")
            output = (bench.root / "apart.out").read_text()
            for part in (str(path), f"process {owner} on ", "give another --live"):
                check(part in output, f"no {part} in\n{output}")
            check_equal(bench.newest_step("apart"), step, "newest snapshot after the refusal")
        check_equal(bench.end(bench.start("apart", "--live", live, ps=2, worker=2)), 0, "exit code once it is free")
        check_equal(list(pathlib.Path(live).iterdir()), [], "what is left under --live at the end")
    run = bench.run_json("apart")
    check_equal(run["model_hash"], whole["model_hash"], "hash after a working store that was in use")
    check_finished(run, LONG)


def a_finished_job_stays_finished(bench):
    bench.generate()
    first = bench.train("run", ps=1, worker=2)
    again = bench.train("run", ps=2, worker=1)
    check_equal(again["model_hash"], first["model_hash"], "hash of a finished job, started again")
    check_finished(again)
    longer = bench.train("run", ps=2, worker=1, sets=["training.epochs=2"])
    check_ledger(longer, 2 * RECORDS)
    whole = bench.train("whole", ps=2, worker=4, sets=["training.epochs=2"])
    check_equal(longer["model_hash"], whole["model_hash"], "hash of two epochs, the second one added later")


def a_profile_is_a_trace_of_its_steps_or_refused(bench):
    bench.generate(records=2000)
    sets = ["metrics.profile.first_step=3", "metrics.profile.steps=2"]
    if "CUDA" not in bench.run("--version"):
        bench.train("run", expect=78, sets=sets)
        check("metrics.profile" in bench.output and "scripts/build cuda" in bench.output, bench.output)
        return
    plain = bench.train("plain", worker=2)
    run = bench.train("run", worker=2, sets=sets)
    check_equal(run["model_hash"], plain["model_hash"], "hash with a profile against one without")
    check_equal([path.name for path in (bench.root / "run/profile").iterdir()], ["worker-0.json"], "traces")
    events = json.loads((bench.root / "run/profile/worker-0.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    check_equal(sorted(name for name in names if name.startswith("step ")), ["step 3", "step 4"], "steps in the trace")
    check("aten::mm" in names or "aten::addmm" in names or "aten::bmm" in names, f"no product in {sorted(names)[:40]}")


CASES = [
    same_job_twice_gives_the_same_hash, workers_do_not_change_the_hash, servers_do_not_change_the_hash,
    rows_expire_by_the_logs_time_on_any_number_of_processes,
    staleness_is_exact_on_any_number_of_processes, killed_ranks_are_restarted_and_nothing_is_lost,
    sigusr1_saves_and_other_numbers_resume, the_ledger_and_the_metrics_add_up,
    eval_agrees_with_the_run_and_leaves_it_alone, bad_records_are_set_aside_and_too_many_stop_the_job,
    every_rank_serves_its_figures, bad_input_is_told_with_its_exit_code, a_corrupt_snapshot_is_found_and_passed_over,
    damaged_rows_send_a_run_back_to_the_newest_whole_snapshot, rows_live_on_a_disk_of_their_own,
    a_working_store_in_use_is_refused_and_free_once_its_holder_is_gone, a_finished_job_stays_finished,
    a_profile_is_a_trace_of_its_steps_or_refused
]


def main(cases=CASES, prefix="hearth-e2e-", bench=Bench):
    """Runs the case that the command line names, or all, each in a folder of its own. Also for other files of cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--keep", action="store_true", help="leave the folders for a look")
    parser.add_argument("case", choices=[case.__name__ for case in cases] + ["all"])
    arguments = parser.parse_args()
    failed = 0
    for case in cases:
        if arguments.case not in ("all", case.__name__):
            continue
        root = tempfile.mkdtemp(prefix=prefix)
        os.chmod(root, 0o755)  # Slurm's munged looks at who may enter
        print(case.__name__, flush=True)
        started = time.monotonic()
        try:
            made = bench(arguments.bin, root)
            case(made)
            made.check_logs()
            print(f"  passed in {time.monotonic() - started:.0f} s", flush=True)
        except Failure as failure:
            failed += 1
            print(f"FAILED {case.__name__}: {failure}", flush=True)
        finally:
            if arguments.keep:
                print(f"  kept {root}")
            else:
                shutil.rmtree(root, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
