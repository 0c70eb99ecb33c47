"""The command of every benchmark over the zoos' architectures: one row each, written as it goes; a crash loses none."""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import documents
from benchmarks.networks import TIMM_LIST, Architecture, architectures

Row = dict[str, Any]
CHUNK = 4  # networks that share a process


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    found = argparse.ArgumentParser(description=description)
    documents.add_outputs(found)
    found.add_argument("--only", default="", help="networks whose name contains this")
    found.add_argument("--timm", type=Path, default=TIMM_LIST, help="a file with timm's architecture names")
    found.add_argument(
        "--jobs", type=int, default=1, help="processes at once, which share the cores' threads"
    )
    found.add_argument(
        "--resume", action="store_true", help="keep the rows that the JSON file has, without errors"
    )
    found.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after this long")
    return found


def run(
    arguments: argparse.Namespace,
    measure: Callable[[Architecture], Row],
    summarize: Callable[[list[Row]], Row],
    markdown: Callable[[Row], str],
    hidden: Collection[str] = (),
    is_whole: Callable[[Row], bool] = lambda row: True,
) -> None:
    """Measure every architecture that the arguments name and write what they ask for. hidden: the keys of a row that
    are too long to print. is_whole: whether nothing is left to measure in a row of an earlier run."""
    end = time.monotonic() + arguments.seconds
    every = list(architectures(arguments.timm, arguments.only))
    rows = kept(arguments.json, every) if arguments.resume else []
    known = {row["network"] for row in rows if is_whole(row)}
    order = {architecture.name: i for i, architecture in enumerate(every)}
    for row in measured(measure, [a for a in every if a.name not in known], arguments.jobs, end):
        others = [r for r in rows if r["network"] != row["network"]]
        rows = sorted([*others, row], key=lambda r: order[r["network"]])
        print(json.dumps({key: value for key, value in row.items() if key not in hidden}), flush=True)
        documents.write_json(arguments, {"summary": summarize(rows), "rows": rows})
    documents.write_page(arguments, {"summary": summarize(rows), "rows": rows}, markdown)


def kept(file: Path | None, every: Sequence[Architecture]) -> list[Row]:
    """The rows of an earlier run that need not be measured again."""
    if file is None or not file.is_file():
        return []
    names = {architecture.name for architecture in every}
    rows: list[Row] = json.loads(file.read_text())["rows"]
    return [row for row in rows if row["network"] in names and "error" not in row]


def measured(
    measure: Callable[[Architecture], Row], every: Iterable[Architecture], jobs: int, end: float
) -> Iterator[Row]:
    """The rows in the order of the architectures, several at once where there are several jobs; none is begun after
    `end` (of the monotonic clock)."""
    work = partial(_unless_late, measure, end)
    if jobs == 1:
        yield from (row for row in map(work, every) if row is not None)
        return
    source = iter(every)
    chunks = iter(lambda: list(islice(source, CHUNK)), [])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(partial(_in_a_process, work, threads), chunks):
            yield from (row for row in rows if row is not None)


def _in_a_process(
    work: Callable[[Architecture], Row | None], threads: int, chunk: Sequence[Architecture]
) -> list[Row | None]:
    """The rows of a few networks, from a process of its own: what networks leave in memory goes with it, and one that
    dies of a network costs that network's row alone."""
    rows: list[Row | None] = []
    left = list(chunk)
    while left:
        with _process(threads) as pool:
            try:
                while left:
                    rows.append(pool.submit(work, left[0]).result())
                    left.pop(0)
            except BrokenProcessPool:
                rows.append(
                    {"network": left.pop(0).name, "error": "the process died, as of too little memory"}
                )
    return rows


def _process(threads: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # forked children of a process with threads may hang
    return ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,))


def _unless_late(
    measure: Callable[[Architecture], Row], end: float, architecture: Architecture
) -> Row | None:
    if time.monotonic() > end:
        return None
    row = measure(architecture)
    gc.collect()
    return row


def worst(figures: list[float]) -> float | None:
    """The largest, or what is no number at all; None of nothing."""
    return max(figures, key=lambda figure: math.inf if math.isnan(figure) else figure, default=None)
