"""`clearfold models`: what the local store or a server has, and how to change that."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from app.cli import console
from app.cli.options import Data, Json, Size, Url, parse_numbers, parse_size, read_settings, store_folder
from models.beside import identity_on_disk

if TYPE_CHECKING:
    from app.library import Library

cli = typer.Typer(
    help="List networks; add and remove them.", invoke_without_command=True, rich_markup_mode=None
)

Order = Literal["RGB", "BGR", "L"]


@cli.callback()
def models(context: typer.Context, url: Url = None, data: Data = None, json: Json = False) -> None:
    """List the networks of the local store, or of a server."""
    if context.invoked_subcommand is not None:
        return
    if url is not None:
        from clearfold_client import Client

        with console.working(f"Asking {url}"), Client(url) as client:
            found = [model.raw for model in client.models()]
    else:
        with console.working("Reading the store"):
            from models.store import Store

            found = [{**model.manifest, "id": model.id} for model in Store(store_folder(data)).models()]
    if json:
        console.result([{key: value for key, value in model.items() if key != "layers"} for model in found])
    else:
        _print(found)


@cli.command()
def add(
    file: Annotated[
        str, typer.Argument(help="A network's file; for the local store also torchvision:NAME, timm:NAME.")
    ],
    name: Annotated[str | None, typer.Option(help="Its name [the file's].")] = None,
    size: Size = None,
    mean: Annotated[str | None, typer.Option(help="Per channel, as .485,.456,.406.")] = None,
    std: Annotated[str | None, typer.Option(help="Per channel, as .229,.224,.225.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on pixels 0..255.")] = None,
    order: Annotated[Order | None, typer.Option(help="Channel order.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with one label a line.")] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --url: a data file of the network that is not called by its name; repeatable."
        ),
    ] = None,
    url: Url = None,
    data: Data = None,
) -> None:
    """Add a network: convert it, fuse it, certify it. The same file again is the same network.

    The data files of an ONNX file that keeps its weights beside it come along; a server is sent only those that are
    called by its own name, as net.onnx.data, and those of --weights."""
    wanted = parse_size(size) if size else None
    stated = {
        "mean": parse_numbers(mean) if mean else None,
        "std": parse_numbers(std) if std else None,
        "scale": scale,
        "order": order,
    }
    if weights and url is None:
        raise typer.BadParameter("the local store finds them by itself", param_hint="--weights")
    lines = labels.read_text(encoding="utf-8").splitlines() if labels else None
    if url is not None:
        model = _upload(url, Path(file), name=name, size=wanted, labels=lines, data=weights or (), **stated)
    else:
        model = _convert(_library(data), file, name, wanted, stated, lines)
    console.out.print(f"{model['id']}  {model['name']}", highlight=False, soft_wrap=True)


@cli.command()
def remove(
    id: Annotated[str, typer.Argument(help="Id, the first 8 characters or more of one, or a name.")],
    url: Url = None,
    data: Data = None,
) -> None:
    """Remove a network."""
    if url is not None:
        from clearfold_client import Client

        with Client(url) as client:
            client.delete_model(id)
        return
    from models.store import Store

    Store(store_folder(data)).delete(id)


def _upload(url: str, file: Path, **options: Any) -> dict[str, Any]:
    from clearfold_client import Client

    with Client(url) as client, console.transferring(f"Sending {file.name}", file.stat().st_size) as progress:
        model = client.upload_model(file, progress=progress, **options)
    return {"id": model.id, "name": model.name}


def _library(data: Path | None) -> "Library":
    from app.conversion import Converter
    from app.library import Library
    from models.store import Store

    settings = read_settings()
    return Library(
        Store(store_folder(data)), Converter(settings.conversion_seconds, settings.conversion_memory)
    )


def _convert(
    library: "Library",
    file: str,
    name: str | None,
    size: tuple[int, int] | None,
    stated: dict[str, Any],
    labels: list[str] | None,
) -> dict[str, Any]:
    from app.conversion import Request
    from models.scan.locations import data_files
    from models.zoo.loader import is_zoo_name

    path = Path(file)
    source = file if not path.exists() and is_zoo_name(file) else path.absolute()
    description = {key: value for key, value in stated.items() if value is not None}
    with console.working(f"Reading {file}") as update:
        beside = data_files(source) if isinstance(source, Path) else ()
        request = Request(source, size=size, description=description, name=name, data=beside)
        model_id = _digest(source, beside)
        with library.store.workspace() as folder:
            model = library.add(request, model_id, folder, lambda stage: update(f"{file}: {stage}")).model
        if labels is not None:
            model = library.label(model.id, labels)
    return {"id": model.id, "name": model.name}


def _digest(source: Path | str, data: Sequence[str]) -> str:
    """The id: of a file by its content and that of its data files, of a zoo network by its name."""
    if isinstance(source, str):
        return hashlib.sha256(source.encode()).hexdigest()
    return identity_on_disk(source, data)


def _print(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not found:
        console.say("There are no networks yet: `clearfold models add FILE` adds one.")
        return
    table = Table("id", "name", "format", "input", "classes", "normalizations", "difference")
    for model in found:
        spec, fused = model["input"], model["fusion"]
        table.add_row(
            model["id"][:12],
            model["name"],
            model["format"],
            f"{spec['channels']}x{spec['size'][0]}x{spec['size'][1]}",
            "-" if model["classes"] is None else str(model["classes"]),
            f"{fused['folded']} folded, {fused['partly'] + fused['kept']} left",
            f"{model['certificate']['max_relative']:.1g}",
        )
    console.out.print(table)
