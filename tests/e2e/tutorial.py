#!/usr/bin/env python3
"""docs/TUTORIAL.md: its commands, word for word, and that they show what its text says. As e2e.py, whose helpers it uses.

Usage: tutorial.py --bin DIR CASE     (or: all)
"""
import json
import pathlib
import re

from e2e import check, check_equal, main
from front import SOURCE, blocks_of, run


def auc_at_ends(bench, name, task):
    """Of the newest step of each era."""
    eras = json.loads(bench.run("history", bench.root / name, "--json"))["eras"]
    return [next(figure["auc"] for figure in era["evaluation"] if figure["task"] == task) for era in eras]


def its_commands_run_as_printed_and_show_what_it_says(bench):
    tree = bench.root / "tree"
    (tree / "build/release").mkdir(parents=True)
    (tree / "build/release/bin").symlink_to(pathlib.Path(bench.hearth).resolve().parent)
    (tree / "scripts").symlink_to(SOURCE / "scripts")
    blocks = blocks_of(SOURCE / "docs/TUTORIAL.md")
    for language, lines in blocks:
        check(language in ("sh", "text"), f"a block is neither sh (is run by this test) nor text: {lines}")
    commands = [line for language, lines in blocks if language == "sh" for line in lines]
    script = bench.root / "commands.sh"
    script.write_text("\n".join(["set -eo pipefail", *commands]) + "\n")
    output = "".join(run(["bash", "-v", script], cwd=tree, expect=0)[1:])

    difference = float(re.search(r"largest difference (\S+) ", output).group(1))
    check(difference <= 1e-6, f"the adopted model's predictions differ by {difference}")
    # What does not depend on the kind of CPU is printed as it is.
    for language, lines in blocks:
        for line in lines if language == "text" else ():
            if line and "…" not in line and "hash" not in line and "largest difference" not in line:
                check(line in output, f"the tutorial shows a line that was not printed: {line}")
    days = auc_at_ends(bench, "tree/out/tutorial/run", "click")
    check_equal(len(days), 3, "eras of the first run")
    check(days[2] > days[0] > 0.6, f"AUC of click over three days: {days}")
    thursday, bad, mended, *rest = auc_at_ends(bench, "tree/out/tutorial/grown", "click")
    check(bad < 0.5 < 0.7 < min(thursday, mended), f"AUC of click with a bad day in the middle: {thursday, bad, mended}")
    check_equal(len(rest), 2, "eras after the bad day")
    check(auc_at_ends(bench, "tree/out/tutorial/grown", "like")[-1] > 0.65, "the new task was not learnt")
    bundle = json.loads((tree / "out/tutorial/bundle/manifest.json").read_text())
    forked = tree / "out/tutorial/grown/snapshots"
    check((forked / str(bundle["train_step"]) / "MANIFEST").exists(), "the best snapshot was not kept")
    check((forked / "111.aside-1").exists(), "what was left is not there")
    served = json.loads((tree / "out/tutorial/served/manifest.json").read_text())
    check_equal(served["train_step"], 156, "step that is served")


CASES = [its_commands_run_as_printed_and_show_what_it_says]

if __name__ == "__main__":
    main(CASES, "hearth-tutorial-")
