#!/usr/bin/env python3
"""End-to-end tests of `hearth plan`: its bytes beside those of real runs. No time is asserted.

Usage: plan.py --bin DIR CASE     (or: all)
"""
import json
import random
import re

import e2e
from e2e import check

RECORDS = 30000
JOB = """
name: "plan" log { name: "train" path: "log.csv" }
task { name: "click" category: "c" label: "click" } task { name: "like" category: "d" label: "like" }
table { name: "id" dim: 16 } table { name: "small" dim: 8 optimizer { kind: ADAM } }
slot { name: "user" table: "id" hash: SALTED } slot { name: "video" table: "id" hash: SALTED }
slot { name: "author" table: "small" hash: SALTED }
model { hidden_1: 32 hidden_2: 16 width_1: 16 width_2: 16 gate_rank_1: 4 gate_rank_2: 2 tower_hidden: 8 }
training { batch_size: 512 lanes: 2 device: CPU }
snapshot { every_steps: 1000000 } metrics { tensorboard: false }
"""


def write_log(bench):
    dice = random.Random(5)
    lines = ["user,video,author,click,like"]
    for _ in range(RECORDS):
        video = int(50000**dice.random())
        lines.append(f"u{dice.randrange(40000)},v{video},a{video % 900},{dice.randrange(2)},{dice.randrange(2)}")
    (bench.root / "log.csv").write_text("\n".join(lines) + "\n")
    (bench.root / "job.txtpb").write_text(JOB)
    bench.job = str(bench.root / "job.txtpb")


def check_near(planned, real, what):
    print(f"  {what}: planned {planned:.0f}, real {real} ({planned / real - 1:+.1%})", flush=True)
    check(abs(planned / real - 1) < 0.15, f"{what}: planned {planned:.0f}, real {real}")


def traffic_of(log):
    """What a role says at its end that went to other ranks and came from them."""
    line = [line for line in log.read_text().splitlines() if "event=traffic " in line][-1]
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}


def planned_bytes_are_those_of_real_runs(bench):
    write_log(bench)
    for ps, worker in ((1, 1), (3, 2)):
        name = f"run-{ps}-{worker}"
        run = bench.train(name, ps=ps, worker=worker)
        rows = [word for table, stats in run["tables"].items() for word in ("--rows", f"{table}={stats['rows']}")]
        plan = json.loads(bench.run("plan", bench.job, "--np-ps", ps, "--np-worker", worker, "--json", *rows))
        ranks = {rank["rank"]: rank for rank in plan["plan"]}

        def figure(rank, part, what):
            return next(one["value"] for one in ranks[rank][part] if one["what"] == what)

        for table, stats in run["tables"].items():
            check_near(ps * figure("server", "memory", f"table {table}"), stats["bytes_memory"],
                       f"{name}: memory of table {table}")
        snapshot = bench.root / name / "snapshots" / str(run["steps"])
        check_near(ps * figure("server", "disk", "rows, once"),
                   sum(path.stat().st_size for path in snapshot.glob("ps-*/*")), f"{name}: rows of the snapshot")
        check_near(figure("worker 0", "disk", "dense.safetensors, a snapshot"),
                   (snapshot / "dense.safetensors").stat().st_size, f"{name}: dense.safetensors")
        logs = bench.root / name / "logs"
        servers = [traffic_of(logs / f"ps-{i}.log") for i in range(ps)]
        of_worker = traffic_of(logs / "worker-0.log")
        for what in ("bytes sent", "bytes received", "messages sent", "messages received"):
            key = what.split()[0] + "_" + what.split()[1]
            check_near(ps * run["steps"] * figure("server", "network", what), sum(one[key] for one in servers),
                       f"{name}: {what} by servers")
            check_near(run["steps"] * figure("worker 0", "network", what), of_worker[key],
                       f"{name}: {what} by worker 0")
        check(plan["dense_parameters"] == run["dense_parameters"], "dense parameters")


CASES = [planned_bytes_are_those_of_real_runs]

if __name__ == "__main__":
    e2e.main(CASES, prefix="hearth-plan-")
