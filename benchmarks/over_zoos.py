"""The command of every benchmark over the zoos' architectures: one row each, written as it goes; a crash loses none."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from benchmarks.networks import TIMM_LIST, Architecture, architectures

Row = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--json", type=Path, help="write rows and summary here")
    found.add_argument("--markdown", type=Path, help="write the table for people here")
    found.add_argument("--only", default="", help="networks whose name contains this")
    found.add_argument("--timm", type=Path, default=TIMM_LIST, help="a file with timm's architecture names")
    found.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after this long")
    return found


def run(
    arguments: argparse.Namespace,
    measure: Callable[[Architecture], Row],
    summarize: Callable[[list[Row]], Row],
    markdown: Callable[[Row], str],
    hidden: Collection[str] = (),
) -> None:
    """Measure every architecture that the arguments name and write what they ask for. hidden: the keys of a row that
    are too long to print."""
    started = time.perf_counter()
    rows: list[Row] = []
    for architecture in architectures(arguments.timm, arguments.only):
        if time.perf_counter() - started > arguments.seconds:
            break
        rows.append(measure(architecture))
        gc.collect()
        print(json.dumps({key: value for key, value in rows[-1].items() if key not in hidden}), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"summary": summarize(rows), "rows": rows}, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown({"summary": summarize(rows), "rows": rows}))
    print(json.dumps(summarize(rows)))
