#!/usr/bin/env python3
"""End-to-end tests of deltas for serving: published while a job trains, killed, applied, compared with full exports
byte for byte.

Usage: deltas.py --bin DIR CASE     (or: all). Standard library only.
"""
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time

import e2e
from e2e import check, check_equal

# Rows come late, are lost, and come back: deletions are many. waiting_max is above what training can outrun.
CHURN = ["table[user].expire_after_steps=9", "table[video].expire_after_steps=14", "table[video].admission.count_min=3",
         "table[author].admission.count_min=2", "export.waiting_max=100"]
EVERY = 24
TOLD_APART = {"manifest.json", "manifest.json.sha256", "golden.jsonl"}  # a merge has no golden records


def files_of(folder, without=()):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in without
    }


def bytes_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def check_same(actual, expected, text):
    check_equal(sorted(actual), sorted(expected), f"{text}: files")
    for name, data in expected.items():
        check(actual[name] == data, f"{text}: {name} differs")


def publishing(*more):
    return [*CHURN, f"export.delta_every_steps={EVERY}", *more]


def links(bench, name):
    """The chain's folders in order: the full export, then its deltas."""
    out = bench.root / name / "export"
    base = min((p for p in out.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    deltas = sorted((p for p in (out / "delta" / base.name).iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    return [base, *deltas]


# --- cases ---


def deltas_make_full_exports_to_the_byte(bench):
    bench.generate()
    run = bench.train("run", ps=2, worker=2, sets=publishing("snapshot.keep=1000"))
    e2e.check_finished(run)
    chain = links(bench, "run")
    last = bench.newest_step("run")
    steps = [manifest_of(link)["version"] for link in chain]
    check_equal(steps, [*range(EVERY, last, EVERY), last], "published steps: each multiple, and the job's end")
    shown = run["export"]
    check_equal([shown[field] for field in ("base", "seq", "step", "published", "failures", "left_out", "waiting")],
                [EVERY, len(chain) - 1, last, len(chain), 0, 0, 0], "export in run.json")
    snapshots = bench.root / "run" / "snapshots"
    upserts = deletions = 0
    for at, delta in enumerate(chain[1:], 1):
        bench.run("verify", delta)
        manifest = manifest_of(delta)
        check_equal([manifest["base_version"], manifest["delta"]["seq"], manifest["delta"]["from_step"]],
                    [EVERY, at, steps[at - 1]], "place of the delta")
        upserts += sum(table["upserts"] for table in manifest["tables"])
        deletions += sum(table["deletions"] for table in manifest["tables"])
        full, applied = bench.root / f"full-{at}", bench.root / f"applied-{at}"
        bench.run("export", snapshots / str(steps[at]), "--out", full)
        bench.run("export", "--apply", chain[0], *chain[1:at + 1], "--out", applied)
        bench.run("verify", applied)
        check_same(files_of(applied, TOLD_APART), files_of(full, TOLD_APART),
                   f"deltas up to step {steps[at]} against a full export")
        tables = {table["name"]: (table["rows"], table["weights_hash"]) for table in manifest_of(full)["tables"]}
        check_equal({table["name"]: (table["rows"], table["weights_hash"]) for table in manifest["tables"]}, tables,
                    "rows in the manifest")
        rows_and_graph = files_of(full, {"golden.jsonl", "keys.npy", "values.npy", "rows.i8"})
        print(f"  step {steps[at]}: delta {bytes_of(delta)} bytes, full export {bytes_of(full)}, its rows and graph "
              f"alone {sum(map(len, rows_and_graph.values()))}", flush=True)
    check(deletions > 100, f"only {deletions} deletions in {len(chain) - 1} deltas: the test is too easy")
    check(upserts > 1000, f"only {upserts} rows touched")
    # The merge by a reader that is not ours.
    for table in manifest_of(chain[0])["tables"]:
        rows, width = {}, table["dim"] * 4
        for link in [base_or_delta / table["folder"] for base_or_delta in chain]:
            deleted = (link / "deleted").read_bytes() if (link / "deleted").exists() else b""
            for at in range(0, len(deleted), 8):
                del rows[deleted[at:at + 8]]
            keys, values = (link / "key").read_bytes(), (link / "emb_vector").read_bytes()
            rows.update((keys[at * 8:at * 8 + 8], values[at * width:(at + 1) * width]) for at in range(len(keys) // 8))
        whole = bench.root / f"full-{len(chain) - 1}" / table["folder"]
        keys, values = (whole / "key").read_bytes(), (whole / "emb_vector").read_bytes()
        check_equal(len(rows) * 8, len(keys), f"rows of {table['name']}")
        check(all(rows.get(keys[at * 8:at * 8 + 8]) == values[at * width:(at + 1) * width]
                  for at in range(len(keys) // 8)), f"rows of {table['name']} merged by hand differ")
    bench.run("score", chain[1], "--logs", *sorted(bench.data.glob("test*")), expect=78)
    # What was merged scores as what was exported.
    logs = sorted(bench.data.glob("test*"))
    scores = [
        bench.run("score", bench.root / f"{kind}-{len(chain) - 1}", "--logs", *logs).splitlines()[1:]
        for kind in ("full", "applied")
    ]
    check_equal(scores[1], scores[0], "scores of the merged bundle")
    # By hand, on other numbers of servers, the same chain: a delta is a function of chain and snapshot.
    bench.train("other", ps=3, worker=1, sets=[*CHURN, "snapshot.keep=1000"])
    hand = bench.root / "hand"
    bench.run("export", bench.root / "other" / "snapshots" / str(EVERY), "--out", hand / str(EVERY))
    for before, step in zip(steps, steps[1:]):
        bench.run("export", bench.root / "other" / "snapshots" / str(step), "--since", before, "--out", hand)
    for at, link in enumerate(chain):
        mine = hand / link.relative_to(bench.root / "run" / "export")
        but_the_job = TOLD_APART | {"job.txtpb"}  # it says whether the run publishes
        check_same(files_of(mine, but_the_job), files_of(link, but_the_job), f"link {at} made by hand on 3 servers")


def exporters_of(bench, name):
    """Processes that publish for the run."""
    folder = str((bench.root / name).resolve())
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        program = os.path.basename(os.fsdecode(arguments[0])) if arguments else ""
        if program in ("hearth-export", "hearth-delta") and folder in os.fsdecode(b" ".join(arguments)):
            found.append(int(entry.name))
    return found


def kills_at_any_time_leave_the_same_chain(bench):
    records = 24000
    bench.generate(records=records)
    whole = bench.train("whole", ps=2, worker=2, sets=publishing())
    e2e.check_finished(whole, records)
    check_equal(whole["export"]["failures"], 0, "failures of the undisturbed run")
    dice = random.Random(7)
    process = bench.start("killed", "--max-restarts", "100", ps=2, worker=2, sets=publishing())
    killed = {}
    step = 0
    for program in [
            "exporter", "hearth-scheduler", "exporter", "hearth-ps", "mpirun", "hearth-worker", "exporter",
            "hearth-scheduler"
    ]:
        bench.wait_for_step("killed", step, process)
        deadline = time.monotonic() + e2e.DEADLINE_S
        while not (pids := exporters_of(bench, "killed") if program == "exporter" else bench.pids(program, "killed")):
            check(process.poll() is None and time.monotonic() < deadline, f"no {program} to kill\n{bench.logs()}")
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.1 if program == "exporter" else 0.8))  # somewhere in a publication
        try:
            os.kill(dice.choice(pids), signal.SIGKILL)
            killed[program] = killed.get(program, 0) + 1
        except ProcessLookupError:
            pass  # it had ended
        step = bench.newest_step("killed") + 12
    code = bench.end(process)
    output = (bench.root / "killed.out").read_text()
    check_equal(code, 0, f"exit code\n{output}\n{bench.logs()}\nexit code")
    print(f"  killed {killed}", flush=True)
    check(len(killed) == 5, f"not every role was killed: {killed}")
    run = bench.run_json("killed")
    e2e.check_finished(run, records)
    check_equal(run["model_hash"], whole["model_hash"], "model hash")
    check_same(files_of(bench.root / "killed" / "export"), files_of(bench.root / "whole" / "export"),
               "everything published")
    check_equal(exporters_of(bench, "killed"), [], "left-over exporters")
    # A finished job whose last publication is missing makes it again at its next start, to the byte.
    before = files_of(bench.root / "killed" / "export")
    shutil.rmtree(links(bench, "killed")[-1])
    e2e.check_finished(bench.train("killed", ps=1, worker=1, sets=publishing()), records)
    check_same(files_of(bench.root / "killed" / "export"), before, "everything published, the last delta again")


def sigusr1_and_a_resume_go_on_with_the_chain(bench):
    records = 24000
    bench.generate(records=records)
    whole = bench.train("whole", ps=2, worker=2, sets=publishing())
    process = bench.start("saved", ps=2, worker=2, sets=publishing())
    bench.wait_for_step("saved", 2 * EVERY, process)
    process.send_signal(signal.SIGUSR1)
    check_equal(bench.end(process), 75, "exit code after SIGUSR1")
    run = bench.train("saved", ps=3, worker=1, sets=publishing())
    check_equal(run["model_hash"], whole["model_hash"], "model hash")
    check_same(files_of(bench.root / "saved" / "export"), files_of(bench.root / "whole" / "export"),
               "everything published")


def bad_input_is_one_error_and_no_half_bundle(bench):
    bench.generate(records=4000)
    bench.train("run", ps=1, worker=2, sets=publishing("export.delta_every_steps=12", "snapshot.keep=1000"))
    chain = links(bench, "run")
    base, deltas = chain[0], chain[1:]
    out = base.parent
    newest = bench.root / "run" / "snapshots" / str(bench.newest_step("run"))

    def refuse(code, text, *arguments, **options):
        bench.run("export", *arguments, expect=code, **options)
        check_equal(len(bench.output.splitlines()), 1, f"lines of the error\n{bench.output}")
        check(text in bench.output, f"{text!r} is not in\n{bench.output}")
        check(not (bench.root / "x").exists() and not list(bench.root.rglob("*.partial-*")),
              "something was left behind")

    def apply(code, text, *arguments):
        refuse(code, text, "--apply", *arguments, "--out", bench.root / "x")

    apply(78, "due is delta 1", base, deltas[1])
    apply(78, "due is delta 2", base, deltas[0], deltas[2])
    apply(78, "due is delta 1", base, deltas[1], deltas[0])
    apply(78, "is a delta", deltas[0])
    apply(66, "absent", bench.root / "absent", deltas[0])
    other = bench.root / "other" / base.name
    bench.run("export", bench.root / "run" / "snapshots" / base.name, "--out", other, "--golden", 0)
    apply(65, "another full export", other, deltas[0])
    bench.run("export", newest, "--out", bench.root / "late" / newest.name)
    apply(78, "due is delta 1 on the full export of step", bench.root / "late" / newest.name, deltas[0])
    refuse(78, "give --since", newest, "--since", 1, "--out", out)
    refuse(78, "is not after", newest, "--since", newest.name, "--out", out)
    refuse(78, "not empty", "--apply", base, "--out", base)
    bench.run("export", newest, "--since", 12, "--format", "hps", "--out", bench.root / "x", expect=64)
    bench.run("train", bench.job, "--out", bench.root / "never", "--set", "export.delta_every_steps=13", expect=78)
    check("export.delta_every_steps" in bench.output and "multiple of snapshot.every_steps" in bench.output,
          bench.output)

    for victim in [
            base / "embeddings" / "user" / "emb_vector", base / "embeddings" / "user" / "key",
            deltas[1] / "dense.safetensors", deltas[1] / "embeddings" / "user" / "deleted", deltas[1] / "manifest.json"
    ]:
        good = victim.read_bytes()
        check(good, f"{victim} is empty: nothing to flip")
        e2e.flip(victim)
        apply(65, victim.name, base)
        victim.write_bytes(good)
    shutil.rmtree(deltas[-1])
    tables = sorted(newest.rglob("*.sst"), key=lambda p: p.stat().st_size)
    good = tables[-1].read_bytes()
    e2e.flip(tables[-1])
    refuse(65, tables[-1].name, newest, "--since", manifest_of(deltas[-2])["version"], "--out", out)
    tables[-1].write_bytes(good)

    # A disk that fills up in the middle: files may not grow beyond a limit.
    def limited(*arguments):
        done = subprocess.run(bench.command("export", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, restore_signals=False,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
        check_equal(done.returncode, 74, f"exit code on a full disk\n{done.stdout}\nexit code")
        check("free some space" in done.stdout, done.stdout)
        check(not (bench.root / "x").exists() and not list(bench.root.rglob("*.partial-*")),
              "something was left behind")

    limited("--apply", base, "--out", bench.root / "x")
    limited(newest, "--since", manifest_of(deltas[-2])["version"], "--out", out)
    bench.run("export", newest, "--since", manifest_of(deltas[-2])["version"], "--out", out)
    bench.run("export", "--apply", base, "--out", bench.root / "x")
    bench.run("verify", bench.root / "x")


def a_tailed_log_reaches_its_delta(bench):
    """Also measures: seconds from a file's rename into the log to the delta that holds its records."""
    bench.generate(records=12288)
    lines = [line for part in sorted((bench.data / "train").iterdir()) for line in part.read_text().splitlines()[1:]]
    header = next(iter(sorted((bench.data / "train").iterdir()))).read_text().splitlines()[0]
    log = bench.root / "log"
    log.mkdir()
    sets = ["log[0].path=", f"log[0].directory={log}", "log[0].piece_bytes=4096", "export.delta_every_steps=12", *CHURN]
    process = bench.start("run", ps=1, worker=2, sets=sets)
    out = bench.root / "run" / "export"
    samples = seq = 0
    seconds = []
    size = 12 * 128
    for begin in range(0, 12288, size):
        part = bench.root / "part"
        part.write_text("\n".join([header, *lines[begin:begin + size]]) + "\n")
        os.rename(part, log / f"part-{begin:06}.csv")
        started = time.monotonic()
        while True:
            check(process.poll() is None, f"the run ended\n{(bench.root / 'run.out').read_text()}\n{bench.logs()}")
            check(time.monotonic() < started + e2e.DEADLINE_S, f"no delta\n{bench.logs()}")
            found = sorted(out.glob("*/manifest.json")) + sorted(out.glob("delta/*/*/manifest.json"))
            published = [json.loads(path.read_text())["samples"] for path in found if ".partial" not in str(path)]
            if published and max(published) > begin:  # a cut falls into the file's steps, which are twelve at least
                break
            time.sleep(0.02)
        seconds.append(time.monotonic() - started)
    (log / "_END").write_text("")
    check_equal(bench.end(process), 0, "exit code")
    run = bench.run_json("run")
    e2e.check_finished(run, 12288)
    check_equal(run["export"]["failures"], 0, "failures")
    bench.run("export", "--apply", links(bench, "run")[0], "--out", bench.root / "applied")
    bench.run("export", bench.root / "run", "--out", bench.root / "full")
    check_same(files_of(bench.root / "applied", TOLD_APART), files_of(bench.root / "full", TOLD_APART), "at the end")
    print("  seconds from a file in the log to its delta: " + " ".join(f"{s:.2f}" for s in seconds), flush=True)


CASES = [
    deltas_make_full_exports_to_the_byte, kills_at_any_time_leave_the_same_chain,
    sigusr1_and_a_resume_go_on_with_the_chain, bad_input_is_one_error_and_no_half_bundle, a_tailed_log_reaches_its_delta
]


if __name__ == "__main__":
    e2e.main(CASES, "hearth-deltas-")
