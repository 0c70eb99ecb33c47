"""Which networks come in, in which form: `python -m benchmarks.coverage --json FILE [--markdown FILE] [--only STR]
[--forms NAME,NAME]`.

Each network is written in every form that its users have (`benchmarks.forms`), run by that form's own runtime on a
batch of two, and opened by Clearfold as a user would open it. Where both run, the largest difference of their outputs
over the output's scale, in float32, says whether the network that came in is the one that was written.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import models
from benchmarks import over_zoos
from benchmarks.architectures import calibrate
from benchmarks.forms import FORMS, Form, Runtime
from benchmarks.networks import Architecture, architectures
from benchmarks.over_zoos import worst
from fusion import Network
from fusion.errors import UnsupportedOperator

IMAGES = 2
DIFFERENCE_GOAL = 1e-4  # of the output's scale
ROUNDINGS = 4  # of two runtimes, each with its own order of sums
MOST_ROUNDING = 1e-2  # what is further from the module than this is another network, whatever runs it
Result = dict[str, Any]
NOTHING: Mapping[str, Result] = {}


def forms_of(row: Result) -> dict[str, Result]:
    """What was found of a network; nothing where its process died of it."""
    found: dict[str, Result] = row.get("forms", {})
    return found


def measure(
    architecture: Architecture, forms: Sequence[str] = (), earlier: Mapping[str, Result] = NOTHING
) -> Result:
    """One network in every form: a row of the table, with `error` where a form that its own runtime runs does not come
    in as what it is.

    forms: only these; the others are taken from the rows of an earlier run, by network.
    """
    before = forms_of(earlier.get(architecture.name, {}))
    row: Result = {"network": architecture.name, "forms": {}}
    try:
        module = calibrate(architecture.build(), architecture)
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, form in FORMS.items():
                if not forms or name in forms:
                    row["forms"][name] = measure_form(form, module, architecture, Path(folder))
                elif name in before:
                    row["forms"][name] = before[name]
                gc.collect()  # exporters leave circles, each as large as the network
    except Exception as error:  # one network that fails must not cost the others
        row["error"] = _short(error)
    for name, found in row["forms"].items():
        if is_mistaken(found) and "error" not in row:
            row["error"] = f"{name}: {_why(found)}"
    return row


def measure_form(form: Form, module: nn.Module, architecture: Architecture, folder: Path) -> Result:
    """One network in one form. attempted: the exporter wrote it; runs_in_original: its own runtime runs it; batch: how
    many images that takes at once, None for any number; converted: Clearfold opens it and answers a batch; difference:
    the answers', over their scale; missing: operators that Clearfold lacks; error: why the first of these failed."""
    found: Result = {
        "attempted": False,
        "runs_in_original": False,
        "batch": None,
        "converted": False,
        "difference": None,
        "missing": [],
        "error": None,
    }
    x = architecture.example(IMAGES)
    started = time.perf_counter()
    try:
        with torch.no_grad():
            source = form.write(module, x, folder)
            found["attempted"] = True
            run = form.load(source)
            expected, found["batch"] = answer(run, x)
            found["runs_in_original"] = True
            found["seconds_to_write_and_run"] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()
        network = models.open(source, size=architecture.shape[1:]).network
        found["seconds_to_open"] = round(time.perf_counter() - started, 1)
        answered = scores(network(x))
        found["converted"] = answered.shape == expected.shape
        found["difference"] = difference(answered, expected)
        if not found["difference"] <= DIFFERENCE_GOAL:
            found |= in_float64(module, network, x, expected)
    except UnsupportedOperator as error:
        found |= {"missing": [error.op], "error": _short(error)}
    except Exception as error:  # what exporters and runtimes refuse is what is asked here
        found["error"] = _short(error)
    return found


def answer(run: Runtime, x: Tensor) -> tuple[Tensor, int | None]:
    """The scores [N, K] of the form's own runtime, and None; where it takes one image at a time only, those put
    together, and 1."""
    try:
        return scores(run(x)), None
    except Exception:
        return torch.cat([scores(run(image)) for image in x.split(1)]), 1


def scores(output: Any) -> Tensor:
    """The first table of class scores in a network's answer, as [N, K]."""
    return next(t for t in _tensors(output) if t.ndim >= 2).flatten(1)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


def difference(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; infinite where one of them is no number."""
    gap = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    return gap if gap == gap else float("inf")


def in_float64(module: nn.Module, network: Network, x: Tensor, expected: Tensor) -> Result:
    """Whether a difference is a mistake, or the rounding of a network that magnifies it. converted_in_float64: from the
    module's answer in float64, that of the network that came in, in float64 too; original_rounding: that of the form's
    own runtime, in float32."""
    module.double()
    try:
        with torch.no_grad():
            exact = scores(module(x.double()))
    finally:
        module.float()
    return {
        "converted_in_float64": difference(network.to(dtype=torch.float64)(x.double()), exact),
        "original_rounding": difference(expected, exact),
    }


def is_right(found: Result) -> bool:
    return bool(found["converted"] and found["difference"] <= DIFFERENCE_GOAL)


def is_rounding(found: Result) -> bool:
    """Whether a difference beyond the goal is the network's own: its runtime's answer is about as far from the module's
    in float64."""
    return bool(
        found["converted"]
        and not is_right(found)
        and found["difference"] <= ROUNDINGS * found["original_rounding"]
        and found["original_rounding"] <= MOST_ROUNDING
    )


def is_mistaken(found: Result) -> bool:
    """Whether what its own runtime runs has not come in as what it is."""
    return found["runs_in_original"] and not is_right(found) and not is_rounding(found)


def _short(error: BaseException) -> str:
    """The kind of an error and what it says, in one line: of the error that all others came of."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:300]}"


def summarize(rows: list[Result]) -> Result:
    """attempted: what exporters wrote; runs_in_original: what of it its own runtime runs; converted: what of that
    Clearfold answers; right: within the goal; rounding: beyond it, by the network's own. All of them together and by
    form."""
    by_form = {
        name: _summary([forms_of(row)[name] for row in rows if name in forms_of(row)]) for name in FORMS
    }
    every = [found for row in rows for found in forms_of(row).values()]
    return {
        "networks": len(rows),
        **_summary(every),
        "by_form": by_form,
        "missing_operators": sorted({op for found in every for op in found["missing"]}),
        "beyond_goals": _named(rows, lambda found: is_mistaken(found) or is_rounding(found)),
        "mistaken": _named(rows, is_mistaken),
        "failed": [row["network"] for row in rows if len(forms_of(row)) < len(FORMS)],
    }


def _named(rows: list[Result], belongs: Callable[[Result], bool]) -> list[str]:
    return [
        f"{row['network']} {name}" for row in rows for name, found in forms_of(row).items() if belongs(found)
    ]


def _summary(found: list[Result]) -> Result:
    ran = [f for f in found if f["runs_in_original"]]
    return {
        "attempted": sum(f["attempted"] for f in found),
        "runs_in_original": len(ran),
        "converted": sum(f["converted"] for f in ran),
        "right": sum(is_right(f) for f in ran),
        "rounding": sum(is_rounding(f) for f in ran),
        "worst_relative_difference": worst([f["difference"] for f in ran if f["difference"] is not None]),
    }


def markdown(document: Result) -> str:
    """The page docs/coverage.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    lines = [
        "# Which networks come in",
        "",
        "Made by `python -m benchmarks.coverage --json FILE --markdown docs/coverage.md`. Random weights, statistics",
        f"calibrated on random images, float32, a batch of {IMAGES} images of noise. Each network is written in eight",
        "forms, run by the form's own runtime (PyTorch, TorchScript, ONNX Runtime) and opened by Clearfold as users",
        "open it; the figures are the largest difference of both outputs over the output's scale (bold beyond",
        f"{DIFFERENCE_GOAL:g}; 0: bit by bit the same). *module*: the",
        "`nn.Module`; *traced*, *scripted*: TorchScript, traced with one image; *exported*: a program of",
        "`torch.export` in a .pt2 file, for one image, as it is by default; *decomposed*: one for any number, in core",
        "ATen; *dynamo*, *legacy*: ONNX by `torch.onnx.export` with `dynamo=True` (the weights in a file beside, as is",
        "its default) and `False`, the batch free; *optimized*: what ONNX Runtime's offline",
        "optimizer makes of the one by dynamo (or of the legacy one, where dynamo writes none), every optimization on.",
        "*no file*: the exporter refuses the network; *no answer*: its own runtime does; †: its own runtime takes one",
        "image at a time (Clearfold takes a batch all the same). *beyond, by rounding*: the difference is at most "
        f"{ROUNDINGS}",
        "times that of the form's own runtime from the module in float64: random weights make some networks magnify",
        "rounding (that of the weights, too, into which exporters fold batch norms), and no two runtimes can agree.",
        "",
        f"| | written | its own runtime runs | converted | within {DIFFERENCE_GOAL:g} | beyond, by rounding | worst |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[_count(name, found) for name, found in summary["by_form"].items()],
        _count("all", summary),
        "",
        f"{summary['networks']} networks. Operators missing: {', '.join(summary['missing_operators']) or 'none'}.",
        "",
        "| network | " + " | ".join(FORMS) + " |",
        "| --- |" + " --- |" * len(FORMS),
        *[
            f"| {row['network']} | " + " | ".join(_cell(forms_of(row).get(name)) for name in FORMS) + " |"
            for row in rows
        ],
    ]
    for title, belongs in SECTIONS.items():
        listed = [
            f"- {row['network']}, {name}: {_why(found)}"
            for row in rows
            for name, found in forms_of(row).items()
            if belongs(found)
        ]
        lines += ["", f"## {title}", "", *listed] if listed else []
    failed = [row for row in rows if len(forms_of(row)) < len(FORMS)]
    if failed:
        lines += ["", "## Not measured to the end", ""]
        lines += [f"- {row['network']}: {row.get('error')}" for row in failed]
    return "\n".join(lines) + "\n"


# Below the table, what needs a word: heading -> which results stand there.
SECTIONS: dict[str, Callable[[Result], bool]] = {
    "Not converted, or not as what it is": is_mistaken,
    "Beyond the goal by the network's own rounding": is_rounding,
    "Written, but not run by its own runtime": lambda found: (
        found["attempted"] and not found["runs_in_original"]
    ),
    "Not written by the exporter": lambda found: not found["attempted"],
}


def _count(name: str, found: Result) -> str:
    figures = (found[key] for key in ("attempted", "runs_in_original", "converted", "right", "rounding"))
    largest = found["worst_relative_difference"]
    cell = "" if largest is None else f"{largest:.1e}"
    return f"| {name} | " + " | ".join(map(str, figures)) + f" | {cell} |"


def _cell(found: Result | None) -> str:
    if found is None:
        return ""
    if not found["attempted"]:
        return "no file"
    if not found["runs_in_original"]:
        return "no answer"
    mark = "†" if found["batch"] else ""
    if not found["converted"]:
        return f"**not converted**{mark}"
    figure = f"{found['difference']:.0e}" if found["difference"] else "0"
    return (figure if is_right(found) else f"**{figure}**") + mark


def _why(found: Result) -> str:
    if found["error"]:
        return f"`{found['error'].replace('`', '')}`"
    return (
        f"differs by {found['difference']:.1e}; from the module in float64, its own runtime's answer differs by "
        f"{found['original_rounding']:.1e} (its rounding), Clearfold's, in float64 too, by "
        f"{found['converted_in_float64']:.1e}"
    )


def main() -> None:
    parser = over_zoos.parser(__doc__)
    parser.add_argument(
        "--forms",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="measure only these, and put them into the rows that --resume keeps where they are not there",
    )
    arguments = parser.parse_args()
    wanted = arguments.forms or tuple(FORMS)
    if unknown := sorted(set(wanted) - set(FORMS)):
        parser.error(f"There is no form {', '.join(unknown)}; there are {', '.join(FORMS)}.")
    rows = over_zoos.kept(arguments.json, list(architectures(arguments.timm))) if arguments.resume else []
    work = partial(measure, forms=wanted, earlier={row["network"]: row for row in rows})
    over_zoos.run(
        arguments, work, summarize, markdown, hidden=("forms",),
        is_whole=lambda row: set(wanted) <= set(forms_of(row)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
