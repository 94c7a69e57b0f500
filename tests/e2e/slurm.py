#!/usr/bin/env python3
"""Hearth on a real Slurm, started here on loopback (slurm_cluster): time limits, requeues, kills. One case a run.

Usage: slurm.py --bin DIR CASE     (or: all)
"""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import e2e
from e2e import Failure, check, check_equal, check_ledger, check_one_token

HERE = pathlib.Path(__file__).resolve().parent
DEADLINE_S = 240
RECORDS = 6000
SETS = ("training.staleness=0",)
PS, WORKER = 2, 2
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")  # JobState, for good


class TooShort(Exception):
    """The job reached its end before the test was done with it: this machine is faster now than it was a minute ago."""


class Cluster:
    def __init__(self, root, nodes):
        self.dir = pathlib.Path(root) / "slurm"
        self.program = str(HERE / "slurm_cluster")
        self.nodes = nodes
        self.environment = dict(os.environ)

    def __enter__(self):
        subprocess.run([self.program, "start", str(self.dir), str(self.nodes)], check=True, timeout=120,
                       stdin=subprocess.DEVNULL)
        text = subprocess.run(["bash", "-c", ". \"$0/env\" && env -0", str(self.dir)], check=True,
                              stdout=subprocess.PIPE).stdout
        self.environment = dict(os.fsdecode(line).split("=", 1) for line in text.split(b"\0") if line)
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            for log in ("slurmctld.log", *(f"n{node + 1}/slurmd.log" for node in range(self.nodes))):
                print("\n".join((self.dir / log).read_text(errors="replace").splitlines()[-15:]), flush=True)
        subprocess.run([self.program, "stop", str(self.dir)], timeout=120, stdin=subprocess.DEVNULL)

    def run(self, *command, expect=0):
        done = subprocess.run(list(map(str, command)), env=self.environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S)
        check(done.returncode == expect,
              f"{' '.join(map(str, command))}: exit {done.returncode}, not {expect}\n{done.stdout}")
        return done.stdout

    def job(self, number):
        """What Slurm says of a job: JobState, Restarts, ExitCode, Reason …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait(self, number, done, what):
        deadline = time.monotonic() + DEADLINE_S
        while not done(job := self.job(number)):
            check(time.monotonic() < deadline, f"{what}: still {job['JobState']} {job['Reason']}")
            time.sleep(0.2)
        return job

    def wait_requeued(self, number, restarts):
        """Until the job is back in the queue for that time; then lets it start at once instead of in two minutes."""
        self.wait(number, lambda job: int(job["Restarts"]) >= restarts and job["JobState"] in ("PENDING", "RUNNING")
                  or job["JobState"] in ENDED, f"requeue {restarts}")
        job = self.job(number)
        if job["JobState"] == "COMPLETED":
            raise TooShort
        check(job["JobState"] in ("PENDING", "RUNNING"),
              f"the job ended, {job['JobState']} {job['ExitCode']}, before requeue {restarts}")
        # Not at once: within the second of its end a node takes the job's credential for the one just revoked.
        if job["JobState"] == "PENDING":
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")
        self.wait(number, lambda job: job["JobState"] != "PENDING", "start after a requeue")


def submit(cluster, bench, name, *extra, ps=PS, worker=WORKER, epochs, minutes):
    text = cluster.run(bench.hearth, "submit", bench.job, "--out", bench.root / name, "--nodes", cluster.nodes,
                       "--time", minutes, "--np-ps", ps, "--np-worker", worker, "--set", f"training.epochs={epochs}",
                       *[word for one in SETS for word in ("--set", one)], *extra)
    number = re.search(r"Submitted batch job (\d+)", text)
    check(number, f"no job number in\n{text}")
    return number.group(1)


def output(bench, name):
    return "".join(
        path.read_text(errors="replace") for path in sorted((bench.root / name).glob("slurm-*.out"))) + bench.logs()


def epochs_for(bench, seconds):
    """Epochs that keep one mpirun run busy for so long on this machine."""
    short = bench.train("short", ps=PS, worker=WORKER, sets=[*SETS, "training.epochs=4"])
    return max(4, round(4 * seconds / max(0.2, short["seconds"])))


def train_whole(bench, epochs):
    """One mpirun run, for what every other is compared with."""
    return bench.train("whole", ps=PS, worker=WORKER, sets=[*SETS, f"training.epochs={epochs}"])


def check_same_end(bench, name, whole, epochs, restarts):
    run = bench.run_json(name)
    check_equal(run["status"], "finished", f"status\n{output(bench, name)}\nstatus")
    check_equal(run["exit"]["code"], 0, "exit code in run.json")
    check_equal(run["restarts"], restarts, "restarts in run.json")
    check_ledger(run, epochs * RECORDS)
    check_equal(run["model_hash"], whole["model_hash"], f"hash of {name}, against one mpirun run")
    check_equal(run["samples"], whole["samples"], f"ledger of {name}")


def check_no_ranks(bench, name):
    for program in ("hearth-scheduler", "hearth-ps", "hearth-worker"):
        check_equal(bench.pids(program, name), [], f"left-over {program} of {name}")


def wait_for_snapshot(bench, name, step=-1):
    """Until there is one past that step."""
    deadline = time.monotonic() + DEADLINE_S
    while bench.newest_step(name) <= step:
        check(time.monotonic() < deadline, f"no snapshot after step {step}\n{output(bench, name)}")
        time.sleep(0.02)


def kill_a_rank(bench, name, program, step):
    deadline = time.monotonic() + DEADLINE_S
    while bench.newest_step(name) <= step or not bench.pids(program, name):
        if (bench.root / name / "run.json").exists() and bench.run_json(name)["status"] == "finished":
            raise TooShort
        check(time.monotonic() < deadline, f"no snapshot after step {step}\n{output(bench, name)}")
        time.sleep(0.02)
    check_one_token([pid for role in ("hearth-scheduler", "hearth-ps", "hearth-worker") for pid in bench.pids(role, name)])
    os.kill(bench.pids(program, name)[-1], signal.SIGKILL)
    print(f"  killed {program} after step {bench.newest_step(name)}", flush=True)


def requeued_three_times(cluster, bench, name, epochs, limit):
    """Twice saved before its time limit (or told to by hand), once put back after a kill."""
    number = submit(cluster, bench, name, "--signal-lead", 25, epochs=epochs, minutes=1 if limit else 10)
    step = -1
    for restart in (1, 2):
        if not limit:
            wait_for_snapshot(bench, name, step)
            cluster.run("scancel", "--signal=USR1", "--batch", number)
        cluster.wait(number, lambda job: int(job["Restarts"]) >= restart or job["JobState"] in ENDED,
                     f"the time limit, {restart}")
        run = bench.run_json(name)
        if run["status"] == "finished":
            raise TooShort
        check_equal((run["status"], run["exit"]["code"]), ("saved", 75),
                    f"run.json between two starts\n{output(bench, name)}\nstate")
        check(bench.newest_step(name) > step, f"a start brought no snapshot\n{output(bench, name)}")
        step = bench.newest_step(name)
        print(f"  requeued at step {step}", flush=True)
        if restart == 2:  # the last starts end by themselves
            cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=30")
        cluster.wait_requeued(number, restart)
    kill_a_rank(bench, name, "hearth-ps", step)
    cluster.wait_requeued(number, 3)
    job = cluster.wait(number, lambda job: job["JobState"] in ENDED, "the end")
    check_equal((job["JobState"], job["ExitCode"]), ("COMPLETED", "0:0"), f"the job's end\n{output(bench, name)}\nend")
    check_equal(job["Restarts"], "3", "requeues by Slurm's count")


def requeues(bench, nodes, limit):
    """Requeued three times, a job ends with the hash of one mpirun run."""
    bench.generate(records=RECORDS)
    # Slurm looks at time limits every 30 s, and a limit is whole minutes: with this lead each start is told 5 to 35 s
    # after its beginning, and two of them must not reach the end.
    epochs = epochs_for(bench, 75 if limit else 12)
    with Cluster(bench.root, nodes) as cluster:
        for attempt in range(4):
            name = f"run{attempt}"
            try:
                requeued_three_times(cluster, bench, name, epochs, limit)
                break
            except TooShort:
                print(f"  {epochs} epochs ended too soon; once more with twice as many", flush=True)
                epochs *= 2
        else:
            raise Failure("the job ended too soon each time")
    check_same_end(bench, name, train_whole(bench, epochs), epochs, 3)
    check_no_ranks(bench, name)


def one_node_requeued_by_its_time_limit_and_a_kill_ends_with_the_same_hash(bench):
    requeues(bench, 1, limit=True)


def two_nodes_requeued_by_signals_and_a_kill_end_with_the_same_hash(bench):
    requeues(bench, 2, limit=False)


def failures_end_the_job_as_documented(bench):
    bench.generate(records=RECORDS)
    no_slurm = dict(os.environ, PATH=str(bench.root))
    refused = subprocess.run([bench.hearth, "submit", bench.job, "--out", bench.root / "none", "--time", "5"],
                             env=no_slurm, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True)
    check_equal(refused.returncode, 78, f"exit without sbatch\n{refused.stdout}\nexit")
    check("sbatch is not on PATH" in refused.stdout, f"no clear error in\n{refused.stdout}")
    check(not (bench.root / "none").exists(), "a refused submit left a folder")
    script = bench.run("submit", bench.job, "--out", bench.root / "none", "--time", "5", "--print")
    (bench.root / "printed.sbatch").write_text(script)
    bare = subprocess.run(["/bin/bash", bench.root / "printed.sbatch"], env=dict(no_slurm, SLURM_JOB_ID="1"), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    check_equal(bare.returncode, 78, f"exit of the script without srun\n{bare.stdout}\nexit")
    check("srun is not on PATH" in bare.stdout, f"no clear error in\n{bare.stdout}")

    with Cluster(bench.root, 1) as cluster:
        # Bad data would be as bad after a requeue.
        part = bench.data / "train" / "part-0000.csv"
        whole = part.read_text()
        part.write_text("\n".join([whole.splitlines()[0]] + ["broken"] * 2000) + "\n")
        number = submit(cluster, bench, "bad", epochs=1, minutes=5)
        job = cluster.wait(number, lambda job: job["JobState"] in ENDED, "the end")
        check_equal((job["JobState"], job["ExitCode"], job["Restarts"]), ("FAILED", "65:0", "0"),
                    f"bad data\n{output(bench, 'bad')}\nend")
        run = bench.run_json("bad")
        check_equal((run["status"], run["exit"]["code"]), ("failed", 65), "run.json after bad data")
        # A dead rank with no requeue left.
        part.write_text(whole)
        number = submit(cluster, bench, "dead", "--max-requeues", 0, epochs=100, minutes=5)
        kill_a_rank(bench, "dead", "hearth-worker", 0)
        job = cluster.wait(number, lambda job: job["JobState"] in ENDED, "the end")
        check_equal((job["JobState"], job["Restarts"]), ("FAILED", "0"), f"a dead rank\n{output(bench, 'dead')}\nend")
        run = bench.run_json("dead")
        check_equal(run["status"], "failed", "status after a dead rank")
        check("--max-requeues" in run["exit"]["reason"], f"reason {run['exit']['reason']!r}")


# An srun whose step TERM cannot end, as where a rank hangs in a write: it lasts as long as the batch script.
SRUN_THAT_HANGS = """#!/bin/bash
trap '' TERM
{srun} "$@" &
trap 'kill -USR1 $!' USR1
while :; do
  wait $!
  code=$?
  kill -0 $! 2>/dev/null || break
done
[ $code = 0 ] || while kill -0 $PPID 2>/dev/null; do sleep 0.1; done
exit $code
"""


def stop_a_server_that_saves(bench, name):
    """A disk that is too slow: one server's half of a snapshot stays unwritten. Returns the snapshot's step."""
    deadline = time.monotonic() + DEADLINE_S

    def half():
        return [int(folder.name) for folder in (bench.root / name / "snapshots").glob("*")
                if folder.name.isdigit() and not (folder / "MANIFEST").exists()]

    while True:
        check(time.monotonic() < deadline, f"no server was caught as it saved\n{output(bench, name)}")
        server = bench.pids("hearth-ps", name)[-1:] if bench.newest_step(name) >= 0 and half() else []
        if server:
            os.kill(server[0], signal.SIGSTOP)
            settled = time.monotonic() + 0.3  # what the others still do
            while half() and time.monotonic() < settled:
                time.sleep(0.02)
            if half():
                print(f"  {name}: a server stopped as it saves step {half()[0]}", flush=True)
                return half()[0]
            os.kill(server[0], signal.SIGCONT)
        time.sleep(0.001)


def cancel(cluster, bench, name, number):
    cluster.run("scancel", number)
    job = cluster.wait(number, lambda job: job["JobState"] in ENDED or job["Restarts"] != "0", "the end")
    check_equal((job["JobState"], job["Restarts"]), ("CANCELLED", "0"), f"scancel\n{output(bench, name)}\nend")
    run = bench.run_json(name)
    check_equal((run["status"], run["exit"]["code"]), ("failed", 143),
                f"run.json after scancel\n{output(bench, name)}\nstate")
    check_no_ranks(bench, name)


def ended_as_it_saves_or_trains_a_job_loses_nothing(bench):
    """By its time limit, by scancel, by an operator's requeue; in one cluster: a time limit takes Slurm a minute."""
    bench.generate(records=RECORDS)
    epochs = 10  # caught at its first snapshots, each job has most of them before it
    (bench.root / "srun").write_text(SRUN_THAT_HANGS.format(srun=shutil.which("srun")))
    (bench.root / "srun").chmod(0o755)
    with Cluster(bench.root, 1) as cluster:
        path = cluster.environment["PATH"]
        cluster.environment["PATH"] = f"{bench.root}:{path}"
        limited = submit(cluster, bench, "limited", "--signal-lead", 20, "--max-requeues", 1, epochs=epochs, minutes=10)
        cluster.environment["PATH"] = path
        half = stop_a_server_that_saves(bench, "limited")
        # Slurm looks every 30 s: asked at one look, ended at the next.
        cluster.run("scontrol", "update", f"JobId={limited}", "EndTime=now+40")
        whole = train_whole(bench, epochs)

        saving = submit(cluster, bench, "saving", epochs=epochs, minutes=10)
        stop_a_server_that_saves(bench, "saving")
        cluster.run("scancel", "--signal=USR1", "--batch", saving)
        deadline = time.monotonic() + DEADLINE_S
        while "stop_asked" not in (bench.root / "saving/logs/scheduler-0.log").read_text():
            check(time.monotonic() < deadline, f"USR1 did not reach the scheduler\n{output(bench, 'saving')}")
            time.sleep(0.02)
        cancel(cluster, bench, "saving", saving)
        saving = submit(cluster, bench, "saving", epochs=epochs, minutes=10)

        training = submit(cluster, bench, "training", epochs=epochs, minutes=10)
        wait_for_snapshot(bench, "training")
        cancel(cluster, bench, "training", training)

        requeued = submit(cluster, bench, "requeued", "--max-requeues", 0, epochs=epochs, minutes=10)
        wait_for_snapshot(bench, "requeued")
        cluster.run("scontrol", "requeue", requeued)
        cluster.wait(requeued, lambda job: job["JobState"] != "COMPLETING", "requeue")
        run = bench.run_json("requeued")
        check_equal((run["status"], run["exit"]["code"]), ("saved", 75),
                    f"run.json\n{output(bench, 'requeued')}\nstate")
        check("by Slurm" in run["exit"]["reason"], f"reason {run['exit']['reason']!r}")
        check_no_ranks(bench, "requeued")
        cluster.wait_requeued(requeued, 1)

        check_equal(
            bench.train("training", ps=PS, worker=WORKER, sets=[*SETS, f"training.epochs={epochs}"])["model_hash"],
            whole["model_hash"], "hash after scancel")
        for name, number, restarts in (("saving", saving, 0), ("requeued", requeued, 1)):
            job = cluster.wait(number, lambda job: job["JobState"] in ENDED, "the end")
            check_equal((job["JobState"], job["ExitCode"]), ("COMPLETED", "0:0"), f"{name}\n{output(bench, name)}\nend")
            check_same_end(bench, name, whole, epochs, restarts)

        cluster.wait(limited,
                     lambda job: job["Restarts"] == "1" and job["JobState"] != "COMPLETING" or job["JobState"] in ENDED,
                     "the time limit")
        run = bench.run_json("limited")
        print(f"  limited: {run['exit']['reason']}", flush=True)
        check_equal((run["status"], run["exit"]["code"]), ("saved", 75), f"run.json\n{output(bench, 'limited')}\nstate")
        # Slurm continues a stopped process before it ends it, which may just be enough for the save.
        if bench.newest_step("limited") < half:
            check_equal(run["exit"]["reason"].split(" (")[0], "the time limit came before the snapshot was whole",
                        "reason")
            check("requeue 1 of 1" in run["exit"]["reason"], f"not counted: {run['exit']['reason']!r}")
        check("stop_asked" in (bench.root / "limited/logs/scheduler-0.log").read_text(),
              "the time limit was not told before")
        cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=30")
        cluster.wait_requeued(limited, 1)
        cluster.wait(limited, lambda job: job["JobState"] in ENDED, "the end")
        check_same_end(bench, "limited", whole, epochs, 1)
        check_no_ranks(bench, "limited")


CASES = [one_node_requeued_by_its_time_limit_and_a_kill_ends_with_the_same_hash,
         two_nodes_requeued_by_signals_and_a_kill_end_with_the_same_hash, failures_end_the_job_as_documented,
         ended_as_it_saves_or_trains_a_job_loses_nothing]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time-out of ctest: still stop the cluster
    e2e.main(CASES, "hearth-slurm-")
