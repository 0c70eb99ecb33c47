"""`clearfold fuse`: fold a network's normalizations away, say where each went, and prove it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import console
from app.cli.options import Json, Size, parse_size

_COLORS = {"folded": "green", "partly": "yellow", "kept": "yellow"}


def fuse(
    net: Annotated[str, typer.Argument(help="A network's file, torchvision:NAME, timm:NAME or builtin.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the fused network: .onnx, or .pt2 (torch.export)."),
    ] = None,
    size: Size = None,
    json: Json = False,
) -> None:
    """Fuse a network, print the report and the certificate, and write the result if asked to."""
    wanted = parse_size(size) if size else None
    suffix = output.suffix.lower() if output is not None else ""
    if output is not None and suffix not in (".onnx", ".pt2"):
        raise typer.BadParameter("the output is a .onnx or a .pt2 file", param_hint="--output")
    with console.working("Loading") as update:
        import fusion
        import models
        from models.convert import certification_inputs
        from models.export import export

        path = Path(net)
        update(f"Opening {net}")
        opened = models.open(path if path.exists() else net, size=wanted)
        update("Fusing")
        fused = fusion.fuse(opened.network, certified=True)
        update("Certifying")
        certificate = fusion.certify(opened.original, fused.network, certification_inputs(opened.input))
        if output is not None:
            update(f"Writing {output}")
            export(fused.network, output)
    report, proof = fused.report.to_json(), certificate.to_json()
    if json:
        written = str(output) if output is not None else None
        console.result({"report": report, "certificate": proof, "notes": opened.notes, "file": written})
        return
    _print(report, proof, opened.notes)
    if output is not None:
        console.out.print(f"Written to {output}", highlight=False, soft_wrap=True)


def _print(report: dict[str, Any], certificate: dict[str, Any], notes: tuple[str, ...]) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    # Folded over lines and never cut: people look layers up in their own code.
    table = Table(
        *(
            Column(name, overflow="fold")
            for name in ("layer", "operator", "outcome", "into", "certificate", "reason")
        )
    )
    for row in report["rows"]:
        outcome = Text(row["outcome"], style=_COLORS.get(row["outcome"], ""))
        proof = "" if row["certificate"] is None else f"{row['certificate']:.1e}"
        table.add_row(row["layer"], row["op"], outcome, _short(row["into"]), proof, Text(row["reason"]))
    if report["rows"]:
        console.out.print(table)
    else:
        console.out.print("There are no normalization layers.")
    for into in dict.fromkeys(merged["into"] for merged in report["merged"]):
        layers = [merged["layer"] for merged in report["merged"] if merged["into"] == into]
        console.out.print(
            f"Merged into {into}, which reads the same values: {_short(layers)}.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console.out.print(
        f"{report['folded']} folded, {report['partly']} partly, {report['kept']} kept. Certificate: outputs "
        f"differ from the original's by at most {certificate['max_relative']:.2g} (relative) on "
        f"{certificate['inputs']} inputs; no fold by itself changes the values behind it by more than "
        f"{report['certificate']:.2g}.",
        highlight=False,
        soft_wrap=True,
    )
    for note in notes:
        console.out.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)


def _short(names: list[str]) -> str:
    """The layers, or how many there are where they would fill the screen (--json names them all)."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
