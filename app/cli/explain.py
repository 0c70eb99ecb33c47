"""`clearfold explain`: a heatmap of one image, without a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import console
from app.cli.options import (
    Data,
    Device,
    Json,
    Size,
    parse_channels,
    parse_settings,
    parse_size,
    store_folder,
)

if TYPE_CHECKING:
    from app.explaining import Answer
    from app.subject import Subject


def explain(
    image: Annotated[Path, typer.Argument(help="The image file.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A file, a name of the store, torchvision:NAME, timm:NAME or builtin."
        ),
    ] = "builtin",
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help='Class index or label [the best]; or an output, as JSON: \'{"output": "out", "channel": 15, '
            '"region": "wins"}\', also with index, reduce (sum, mean, max, norm, cosine) and a box.',
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="LRP, or for comparison IntegratedGradients, SmoothGrad, InputXGradient, GuidedBackprop, Occlusion or "
            "GradCAM.",
        ),
    ] = "LRP",
    composite: Annotated[
        str | None,
        typer.Option("--composite", "-c", help="LRP's rules; auto picks by the network [EpsilonPlusFlat]."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A parameter of the composite or method; repeatable."
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="An image whose bright pixels say where the output counts.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="An image whose output this one's is compared with.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Why not this class: its index or label, or 'others'.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            help="Draw the relevance at this layer, and name its channels; for GradCAM, the layer to weigh.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="How many channels of the layer to name [10].")
    ] = None,
    through: Annotated[
        list[str] | None,
        typer.Option(
            "--through", metavar="LAYER:3,5", help="Only relevance that passes these channels; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The PNG [IMAGE.heatmap.png].")
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Draw the heatmap over the image.")] = False,
    cmap: Annotated[str, typer.Option("--cmap", help="Colour map.")] = "bwr",
    size: Size = None,
    device: Device = "auto",
    data: Data = None,
    json: Json = False,
) -> None:
    """Explain an image and write the heatmap as PNG."""
    content = image.read_bytes()
    wanted = parse_size(size) if size else None
    asked = {"composite": composite, "layer": layer, "top": top, "through": through}
    stated = parse_settings(settings or ())
    with console.working("Loading") as update:
        from app import composites, encoding, explaining, methods

        rules = composite or composites.DEFAULT
        question = explaining.Question(
            content,
            target,
            rules,
            _parameters(method, rules, stated, {key for key, value in asked.items() if value}, layer),
            method,
            against,
            layer,
            top or 10,
            parse_channels(through or ()),
            None if mask is None else mask.read_bytes(),
            None if reference is None else reference.read_bytes(),
        )
        update(f"Loading {model}")
        ruled = question.parameters if method == methods.LRP else {}
        subject = _subject(model, wanted, rules, ruled, device, data)
        update("Explaining")
        answer = explaining.explain(lambda: subject, question)
        look = encoding.Look("overlay" if overlay else "heatmap", cmap)
        path = output or image.with_suffix(".heatmap.png")
        path.write_bytes(encoding.as_png(answer, look))
    if json:
        console.result({**answer.summary, "file": str(path)})
    else:
        _tell(answer, path)
    for warning in answer.summary["warnings"]:
        console.say(f"Warning: {warning}")


def _parameters(
    method: str, composite: str, stated: dict[str, Any], given: set[str], layer: str | None
) -> dict[str, Any]:
    """What the method or the composite is told."""
    from app import methods

    if layer and "layer" in methods.of(method).options:
        stated = {**stated, "layer": layer}
    try:
        methods.refuse_others(method, given)
        return methods.read(method, stated, composite)
    except methods.WrongOption as error:
        raise typer.BadParameter(f"{error.field}: {error}") from None


def _subject(
    model: str,
    size: tuple[int, int] | None,
    composite: str,
    parameters: Mapping[str, float],
    device: str,
    data: Path | None,
) -> "Subject":
    """The network from wherever it is: a file, the zoo, or the local store."""
    import fusion
    import lrp
    import models
    from app import composites
    from app.engine import Engine
    from app.subject import Subject
    from models.store import Store
    from models.zoo.loader import is_zoo_name

    path = Path(model)
    if not path.is_file() and not is_zoo_name(model):
        return Engine(Store(store_folder(data)), device, keep=1).ready(model, composite, parameters)
    opened = models.open(path if path.is_file() else model, size=size)
    network = fusion.fuse(opened.network).network
    rules = composites.rules(composite, parameters, opened.input)
    explainer = lrp.Explainer(network, composite=rules, device=device, strict=False)
    return Subject(model, opened.input, opened.labels, opened.classes, explainer)


def _tell(answer: "Answer", path: Path) -> None:
    prediction, target, sums = (answer.summary[key] for key in ("prediction", "target", "sums"))
    if prediction is not None:
        console.out.print(
            f"Prediction  {_called(prediction)}, probability {prediction['probability']:.3f}", highlight=False
        )
    if sums is None:
        account = (
            f"; {answer.summary['method']} keeps no ledger, the map's sum is {answer.summary['sum']:.4g}"
        )
    else:
        account = f" = relevance {sums['input']:.4g} + kept {sums['kept']:.4g}"
    console.out.print(
        f"Explained   {_named(target)}{_compared(answer.summary)}, score {target['score']:.4g}{account}",
        highlight=False,
        markup=False,
    )
    if "reason" in answer.summary:
        console.out.print(
            f"Composite   {answer.summary['reason']}", highlight=False, markup=False, soft_wrap=True
        )
    inner = answer.summary.get("inner")
    if inner is not None:
        console.out.print(
            f"At          {inner['layer']}, {inner['channels']} channels, relevance {inner['sum']:.4g}",
            highlight=False,
        )
        if inner["outside"]:
            console.out.print(
                f"  of it {inner['outside']:.4g} at tokens that stand for no part of the image",
                highlight=False,
            )
        for entry in inner["top"]:
            console.out.print(f"  channel {entry['channel']:<6}{entry['relevance']:>12.4g}", highlight=False)
    console.out.print(f"Heatmap     {path}", highlight=False, soft_wrap=True)


def _compared(summary: dict[str, Any]) -> str:
    against = summary.get("against")
    if against is None:
        return ""
    return f" against {'all others' if isinstance(against, str) else _called(against)}"


def _named(target: dict[str, Any]) -> str:
    """A class by its label; anything else as the explanation has it in words, with the channel's label."""
    if target["index"] is not None:
        return _called(target)
    label = f" ({target['label']})" if target["label"] else ""
    return f"{target['explained']}{label}"


def _called(entry: dict[str, object]) -> str:
    return f"{entry['label']} ({entry['index']})" if entry["label"] else f"class {entry['index']}"
