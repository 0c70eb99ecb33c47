"""Read files changed at random, and say what was found.

    python -m benchmarks.fuzz --seed 0 --count 2000 --json FILE

`--keep FOLDER` writes the files behind the findings there. The exit code is 1 where there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from app.problems import KINDS
from benchmarks import documents
from benchmarks.fuzz.run import SECONDS, Row, mutant, run

FINDINGS = ("unclear", "crashed", "hung")


def summarize(rows: list[Row], seed: int) -> dict[str, Any]:
    """How many ended how, and the codes that users would see."""
    outcomes = Counter(row["outcome"] for row in rows)
    return {
        "seed": seed,
        "files": len(rows),
        **{name: outcomes[name] for name in ("read", "refused", *FINDINGS)},
        "unknown_codes": sorted({row["code"] for row in rows if "code" in row} - set(KINDS)),
        "codes": dict(Counter(row["code"] for row in rows if "code" in row).most_common()),
        "slowest_seconds": max((row.get("seconds", 0) for row in rows), default=0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the number of the first file")
    parser.add_argument("--count", type=int, default=2000, help="files")
    parser.add_argument("--clock", type=float, default=SECONDS, help="seconds for one file")
    parser.add_argument("--keep", type=Path, help="a folder for the files behind findings")
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    options = parser.parse_args()
    rows: list[Row] = []
    for row in run(options.seed, range(options.start, options.start + options.count), options.clock):
        rows.append(row)
        if row["outcome"] in FINDINGS:
            print(json.dumps(row), flush=True)
            if options.keep:
                made = mutant(options.seed, row["index"])
                options.keep.mkdir(parents=True, exist_ok=True)
                name = f"{options.seed}-{made.index}{made.specimen.suffix}"
                (options.keep / name).write_bytes(made.data)
    document = {"summary": summarize(rows, options.seed), "rows": rows}
    documents.write_json(options, document)
    print(json.dumps(document["summary"]))
    return 1 if any(row["outcome"] in FINDINGS for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
