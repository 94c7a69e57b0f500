#!/usr/bin/env python3
"""End-to-end tests of the front command: the documents' commands, what mpirun refuses, outputs, wrong files, doctor.

Usage: front.py --bin DIR CASE     (or: all)
"""
import os
import pathlib
import re
import shutil
import stat
import subprocess
import zipfile

import e2e
from e2e import check, check_equal

SOURCE = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART_RECORDS = 12000

JOB = """
name: "small" log { name: "train" path: "log.csv" } task { name: "click" category: "c" label: "click" }
table { name: "t" dim: 4 } slot { name: "user" table: "t" hash: HASHED }
model { kind: SHARED_BOTTOM hidden_1: 8 width_1: 8 tower_hidden: 4 }
training { batch_size: 100 lanes: 1 } metrics { tensorboard: false }
"""
LOG = "user,click\n" + "".join(f"u{i % 7},{i % 2}\n" for i in range(400))


def run(arguments, *, cwd=None, env=None, stdout=subprocess.PIPE, expect=None):
    """A command with its outputs apart; returns (code, stdout, stderr)."""
    process = subprocess.run(list(map(str, arguments)), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                             cwd=cwd, env={**os.environ, **(env or {})}, timeout=e2e.DEADLINE_S)
    out, err = (process.stdout or b"").decode(errors="replace"), process.stderr.decode(errors="replace")
    print(f"  exit {process.returncode}: {' '.join(map(str, arguments))[:160]}", flush=True)
    if expect is not None:
        check_equal(process.returncode, expect, f"{arguments}\n{out}\n{err}\nexit code")
    return process.returncode, out, err


def small(bench):
    (bench.root / "log.csv").write_text(LOG)
    (bench.root / "job.txtpb").write_text(JOB)
    bench.job = str(bench.root / "job.txtpb")


def blocks_of(path):
    """The document's blocks of code, as (language, lines)."""
    blocks, open_block = [], None
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            if open_block is None:
                open_block = (line[3:].strip(), [])
            else:
                blocks.append(open_block)
                open_block = None
        elif open_block is not None:
            open_block[1].append(line)
    check(open_block is None, f"{path}: a block of code does not end")
    return blocks


def the_documents_commands_run_as_printed(bench):
    """In a folder that looks as scripts/quickstart leaves it, with a shorter log."""
    tree = bench.root / "tree"
    (tree / "build/release").mkdir(parents=True)
    (tree / "build/release/bin").symlink_to(pathlib.Path(bench.hearth).resolve().parent)
    for name in ("scripts", "common", "docs"):
        (tree / name).symlink_to(SOURCE / name)
    data = tree / "out/quickstart/data"
    bench.run("generate", SOURCE / "scripts/jobs/synthetic-log.txtpb", "--out", data, "--records", QUICKSTART_RECORDS)
    bench.run("train", data / "job.txtpb", "--out", tree / "out/quickstart/run", "--np-ps", 2, "--np-worker", 2)
    quickstart = (SOURCE / "scripts/quickstart").read_text()
    for line in ('generate scripts/jobs/synthetic-log.txtpb --out "$out/data"',
                 'train "$out/data/job.txtpb" --out "$out/run"'):
        check(line in quickstart, f"the quickstart does something else than this test: {line!r} is not in it")
    built = set(re.search(r"scripts/build release (.*)", quickstart).group(1).split())
    programs = [path.name for path in pathlib.Path(bench.hearth).parent.iterdir()]
    needed = {name for name in programs if re.fullmatch(r"hearth(-[a-z]+)?", name)}
    check_equal(built | {"hearth-ping"}, needed, "programs that the quickstart builds")  # the ping comes with hearth

    script = ["set -eo pipefail"]
    commands = set()
    for name in ("README.md", "docs/OPERATIONS.md"):
        for language, lines in blocks_of(SOURCE / name):
            check(language in ("sh", "text"), f"{name}: a block is neither sh (is run by this test) nor text: {lines}")
            if language == "sh":
                script += [f"echo '== {name}'"] + lines
                commands |= {line.split()[1] for line in lines if line.startswith("hearth ")}
    script_path = bench.root / "commands.sh"
    script_path.write_text("\n".join(script) + "\n")
    run(["bash", "-v", script_path], cwd=tree, expect=0)
    help_text = run([bench.hearth, "--help"], expect=0)[1]
    listed = set(re.findall(r"^  ([a-z]+) ", help_text, re.MULTILINE))
    check_equal(commands - {"--help"}, listed - {"completion"},
                "commands that the documents run, and all that there are")

    # A flag that a document's text names behind a command exists.
    for name in ("README.md", "docs/OPERATIONS.md"):
        for command, rest in re.findall(r"`hearth ([a-z]+)([^`]*)`", (SOURCE / name).read_text()):
            check(command in listed, f"{name}: there is no hearth {command}")
            extra = [flag for flag in ("--apply", "--since") if flag in rest]
            options = run([bench.hearth, command, *extra, "--help"])[1]
            for flag in re.findall(r"--[a-z][a-z-]*", rest):
                check(flag in options, f"{name}: hearth {command} has no {flag}")


def what_mpirun_refuses_is_told_and_not_retried(bench):
    small(bench)
    (bench.root / "empty").write_text("# none\n")
    (bench.root / "unknown").write_text("no-such-host.invalid slots=4\n")
    for name, reason in (("empty", "No nodes are available"), ("unknown", "no-such-host")):
        _, _, err = run([bench.hearth, "train", bench.job, "--out", bench.root / f"run-{name}", "--hostfile",
                         bench.root / name], expect=78)
        check(reason in err, f"the reason of mpirun is not in\n{err}")
        check("; restart " not in err, f"was tried again:\n{err}")
        check_equal(bench.run_json(f"run-{name}")["exit"]["code"], 78, "code in run.json")
        check(reason in bench.run_json(f"run-{name}")["exit"]["reason"], "the reason is not in run.json")
    _, _, err = run([bench.hearth, "train", bench.job, "--out", bench.root / "no-interface"], expect=78,
                    env={"OMPI_MCA_oob_tcp_if_include": "nope0"})
    check("nope0" in err, f"the interface is not named in\n{err}")
    # Below another mpirun it trains: the ranks are not told of that one.
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    run(["mpirun", "-np", 1, bench.hearth, "train", bench.job, "--out", bench.root / "below"], env=root, expect=0)
    check_equal(bench.run_json("below")["status"], "finished", "status")


def output_goes_where_its_user_says(bench):
    small(bench)
    bench.run("train", bench.job, "--out", bench.root / "run")
    bench.run("export", bench.root / "run", "--out", bench.root / "bundle", "--log", "train")
    log = bench.root / "log.csv"
    evaluate = [bench.hearth, "eval", bench.job, "--snapshot", bench.root / "run", "--logs", log]
    score = [bench.hearth, "score", bench.root / "bundle", "--logs", log, "--log", "train"]

    run([*evaluate, "--predictions", "plain.tsv"], cwd=bench.root, expect=0)
    expected = (bench.root / "plain.tsv").read_text()
    check_equal(len(expected.splitlines()), 401, "lines of predictions")
    for number, command in enumerate((evaluate, score)):
        pipe, link, target = (bench.root / f"{name}-{number}" for name in ("pipe", "link", "target"))
        os.mkfifo(pipe)
        with open(bench.root / "got", "wb") as got:
            reader = subprocess.Popen(["cat", pipe], stdout=got)
            run([*command, "--predictions", pipe], expect=0)
            reader.wait(e2e.DEADLINE_S)
        lines = len((bench.root / "got").read_text().splitlines())
        check_equal(lines, 401, "lines through the pipe")
        check(stat.S_ISFIFO(pipe.lstat().st_mode), "the pipe was replaced")
        target.write_text("old")
        link.symlink_to(target.name)
        run([*command, "--predictions", link], expect=0)
        check(link.is_symlink(), "the link was replaced")
        check_equal(len(target.read_text().splitlines()), 401, "lines behind the link")
        _, out, _ = run([*command, "--predictions", "/dev/stdout"], expect=0)
        check_equal(out.count("log.csv\t"), 400, f"predictions on standard output\n{out[:500]}\nnumber")
        run([*command, "--predictions", bench.root / "nowhere" / "p.tsv"], expect=66)
        run([*command, "--predictions", bench.root], expect=78)
        run([*command, "--predictions", "/dev/full"], expect=74)
        name = f"bare-{number}.tsv.zst"
        run([*command, "--predictions", name], cwd=bench.root, expect=0)
        check_equal(len(e2e.read_predictions(bench.root / name)), 400, "predictions under a bare name")
    check(not [path for path in bench.root.iterdir() if ".tmp" in path.name], "something is left beside the outputs")

    trained, bundle = bench.root / "run", bench.root / "bundle"
    commands = [["--help"], ["--version"], ["train", "--help"], ["train", bench.job, "--print-job"],
                ["inspect", trained], ["inspect", trained, "--json"], ["history", trained],
                ["history", trained, "--json"], ["verify", trained], ["verify", bundle],
                ["completion", "bash"], ["export", "--help"], ["export", "--apply", "--help"], score[1:],
                ["score", "--help"], ["export", trained, "--out", bench.root / "again", "--golden", 0], evaluate[1:],
                ["submit", bench.job, "--out", bench.root / "slurm", "--time", 5, "--print"]]
    for command in commands:
        with open("/dev/full", "wb") as full:
            code, _, err = run([bench.hearth, *command], stdout=full)
        check_equal(code, 74, f"hearth {command} > /dev/full\n{err}\nexit code")
    for role in ("hearth-scheduler", "hearth-ps", "hearth-worker", "hearth-ping"):
        with open("/dev/full", "wb") as full:
            code, _, _ = run([str(pathlib.Path(bench.hearth).parent / role), "--help"], stdout=full)
        check_equal(code, 74, f"{role} --help > /dev/full: exit code")
    # Closed altogether: nothing of it lands in a file that is opened next.
    code = subprocess.run(["bash", "-c", 'exec "$0" inspect "$1" >&-', bench.hearth, str(bench.root / "run")],
                          stderr=subprocess.DEVNULL).returncode
    check_equal(code, 74, "exit code with standard output closed")


def a_wrong_file_is_named_before_any_rank_starts(bench):
    small(bench)
    with zipfile.ZipFile(bench.root / "zip.csv", "w") as archive:
        archive.writestr("x.csv", LOG)
    (bench.root / "utf16.csv").write_bytes(LOG.encode("utf-16"))
    (bench.root / "semicolon.csv").write_text(LOG.replace(",", ";"))
    (bench.root / "case.csv").write_text(LOG.replace("user,click", "User,Click"))
    (bench.root / "old-mac.csv").write_text(LOG.replace("\n", "\r"))
    for name, code, texts in (("zip.csv", 65, ["zip archive"]), ("utf16.csv", 65, ["is text in UTF-16"]),
                              ("semicolon.csv", 78, ['user;click', 'delimiter: ";"']),
                              ("case.csv", 78, ['it has "User"', "its header has 2 columns: User, Click"]),
                              ("old-mac.csv", 65, ["old-mac.csv: byte ", "\\r"])):
        out = bench.root / f"run-{name}"
        _, _, err = run([bench.hearth, "train", bench.job, "--out", out, "--set", f"log[0].path={name}"], expect=code)
        for text in (name, *texts):
            check(text in err, f"{text!r} is not in\n{err}")
        check_equal(err.count(texts[0]), 1, f"how often it is told:\n{err}\n")
        check(not out.exists(), "the run's folder was made")
    train = [bench.hearth, "train", bench.job, "--out"]
    _, _, err = run([*train, bench.root / "both", "--set", "slot[0].column=typo", "--set", "task[0].label=click = 1"],
                    expect=78)
    check("typo" in err and 'label of task "click"' in err, f"not all faults are told:\n{err}")
    _, _, err = run([*train, bench.root / "x", "--set", "training.epochs=many"], expect=78)
    check(err.startswith("hearth: ") and "libprotobuf" not in err, f"the first line is not ours:\n{err}")
    subprocess.run(["zstd", "-q", "--long=31", "-o", bench.root / "long.csv.zst"], input=LOG.encode(), check=True)
    _, _, err = run([*train, bench.root / "long", "--set", "log[0].path=long.csv.zst"], expect=65)
    check("more than 128 MiB" in err, f"the window is not named in\n{err}")
    check("damaged" not in err, f"a whole file is called damaged:\n{err}")


def doctor_tells_cause_and_remedy(bench):
    code, out, _ = run([bench.hearth, "doctor", "--out", bench.root])
    lines = {line.split()[1]: line for line in out.splitlines() if line.split()[0] in ("ok", "FAULT")}
    for what in ("mpi", "programs", "ping", "cores", "memory", "disk", "tmp", "shm", "ports", "gpu"):
        check(what in lines, f"nothing is said of {what}:\n{out}")
    for what in ("mpi", "programs", "ping", "ports"):
        check(lines[what].startswith("ok"), f"a fault where the other tests run:\n{lines[what]}")
    check("two ranks swap" in lines["ping"], lines["ping"])
    check_equal(code, 78 if "FAULT" in out else 0, f"exit code beside\n{out}\n")

    (bench.root / "hosts").write_text("no-such-host.invalid\n")
    _, out, _ = run([bench.hearth, "doctor", "--hostfile", bench.root / "hosts"], expect=78)
    check(re.search(r"^FAULT +ping .*no-such-host", out, re.MULTILINE), out)
    # A folder with the front command alone, where nothing is on PATH.
    lonely = bench.root / "lonely"
    lonely.mkdir()
    shutil.copy(bench.hearth, lonely)
    _, out, _ = run([lonely / "hearth", "doctor", "--out", bench.root / "none"], env={"PATH": "/nowhere"}, expect=78)
    for fault in (r"^FAULT +mpi +mpirun is not on PATH; install Open MPI", r"^FAULT +disk .*No such file.*--out",
                  r"^FAULT +programs .*hearth-worker: No such file.*scripts/build"):
        check(re.search(fault, out, re.MULTILINE), f"{fault} is not in\n{out}")


def a_shell_completes_commands_and_options(bench):
    def complete(*words):
        script = ('source <("$0" completion bash); COMP_WORDS=("$0" "${@:1}"); COMP_CWORD=$#; _hearth; '
                  'printf "%s\\n" "${COMPREPLY[@]}"')
        return run(["bash", "-euc", script, bench.hearth, *words], expect=0, cwd=bench.root)[1].split()

    check_equal(complete("tr"), ["train"], "completion of tr")
    check("--hostfile" in complete("train", "job", "--"), "train has no --hostfile")
    check_equal(complete("export", "run", "--gold"), ["--golden"], "completion of export --gold")
    check_equal(complete("completion", ""), ["bash", "zsh"], "completion of completion")
    (bench.root / "jobs file.txtpb").write_text("")
    check("jobs" in " ".join(complete("train", "jobs")), "files are not completed")
    run([bench.hearth, "completion", "fish"], expect=64)
    _, _, err = run([bench.hearth, "tran", "job"], expect=64)
    check('no command "tran"; did you mean train?' in err, f"another word than was meant:\n{err}")
    script = 'autoload -Uz compinit && compinit -D; source <("$0" completion zsh); print -- ${_comps[hearth]}'
    check_equal(run(["zsh", "-fc", script, bench.hearth], expect=0)[1].split(), ["_hearth"], "zsh's completion")


CASES = [the_documents_commands_run_as_printed, what_mpirun_refuses_is_told_and_not_retried,
         output_goes_where_its_user_says, a_wrong_file_is_named_before_any_rank_starts, doctor_tells_cause_and_remedy,
         a_shell_completes_commands_and_options]

if __name__ == "__main__":
    e2e.main(CASES, prefix="hearth-front-")
