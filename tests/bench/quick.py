#!/usr/bin/env python3
"""scripts/bench --quick runs through and its file has every row with finite figures. No figure is judged.

Usage: quick.py --bin DIR
"""
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).resolve().parents[2]
# work → whether it has a limit
ROWS = {
    "table: pull, uniform / bare table": True,
    "table: pull, Zipf 1.05 / bare table": True,
    "table: push, uniform / bare table": True,
    "table: push, Zipf 1.05 / bare table": True,
    "table: new rows": False,
    "table: longest pause of 20 k new rows": False,
    "table: memory beyond weights and state, resident": False,
    "table: memory beyond weights and state, as it says": False,
    "store: rows that leave memory": False,
    "store: pull of cold rows / the same once more": True,
    "store: prefetch and pull of cold rows": False,
    "store: pull after prefetch / the same once more": True,
    "job: shared bottom, staleness 0, a tenth in memory / all": True,
    "job: shared bottom, staleness 0, cold rows brought ahead": False,
    "job: shared bottom, staleness 2, a tenth in memory / all": True,
    "job: shared bottom, staleness 2, cold rows brought ahead": False,
    "job: HoME, staleness 0, a tenth in memory / all": True,
    "job: HoME, staleness 0, cold rows brought ahead": False,
    "cut: every N steps / one at the end": True,
    "cut: longest stop of pulls": False,
    "start: to the first step of a resume, N M rows": False,
    "net: 4 KiB one way / bare MPI": True,
    "net: bytes of a pull there and back / bare MPI": True,
    "net: pull in training / table and MPI": True,
    "net: pull in training / the same and the push before it": True,
    "reader: delimited text": False,
    "reader: JSON lines / delimited text": True,
}


def main():
    with tempfile.TemporaryDirectory(prefix="hearth-bench-quick-") as folder:
        path = pathlib.Path(folder) / "bench.json"
        subprocess.run([SOURCE / "scripts/bench", "--quick", "--json", path, *sys.argv[1:]], check=True)
        rows = json.loads(path.read_text())
    faults = []
    for row in rows:
        if not isinstance(row["unit"], str) or not math.isfinite(row["ours"]):
            faults.append(f"{row['work']}: {row}")
    # Sizes are the run's.
    seen = {re.sub(r"every \d+|[\d.]+(?= M rows)", lambda size: re.sub(r"[\d.]+", "N", size[0]), row["work"]): row
            for row in rows}
    for work, has_limit in ROWS.items():
        row = seen.pop(work, None)
        if row is None:
            faults.append(f"{work}: is missing")
        elif has_limit and not (math.isfinite(row["limit"]) and math.isfinite(row["ratio"])):
            faults.append(f"{work}: no limit or ratio: {row}")
    faults += [f"{work}: is not known here" for work in seen]
    print("\n".join(faults) or f"all {len(rows)} rows are there")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
