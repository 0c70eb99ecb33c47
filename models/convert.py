"""The conversion: opens one model file, fuses it, certifies it and writes the artefact.

It is the only place where a file from outside is parsed, and runs in a child process (`models.worker`), so that a
file that crashes its reader, or asks for more memory than there is, takes nothing else down. Arguments:

    FILE FOLDER [--size HxW] [--description JSON] [--name NAME] [--refuse FORMAT] [--data NAME]
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import ClearfoldError
from models.beside import identity_on_disk
from models.memory import release
from models.worker import Say

if TYPE_CHECKING:
    from torch import Tensor

    from fusion import Certificate, Network
    from models import Opened
    from models.preprocess import InputSpec

CERTIFIED_ON = 8  # inputs, at least
DIFFERENT = 0.05  # relative: beyond this the fused network is not the network that was uploaded
# The same for what computes in integers. Sums fall on the other side of a half here and there, and over fifty layers
# that comes to a few of the hundred steps that an output has (0.06 on ResNet-50).
DIFFERENT_STEPS = 0.15
REMARKABLE = 1e-4  # relative: beyond this the user should know, as with files in half precision


_CALLED = {"torchscript": "TorchScript", "export": "torch.export"}


class NotEquivalent(ClearfoldError):
    """What was read from the file does not compute what the file's own runtime computes."""

    code = "not-equivalent"


class FormatRefused(ClearfoldError):
    """A format that this server does not take."""

    code = "format-refused"


def convert(
    source: str | Path,
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    description: dict[str, Any] | None = None,
    name: str | None = None,
    refused: Sequence[str] = (),
    data: Sequence[str] = (),
    say: Say = lambda stage: None,
) -> dict[str, Any]:
    """Write the artefact of a model file or zoo name to `folder`, and return its manifest.

    `description` holds the fields of the input that the user states (mean, std, scale, order, ...); what it
    leaves out is taken from the file, or by default. `data` names the files beside it that its digest covers too.
    """
    import fusion

    say("opening")
    _refuse(source, refused)
    opened = _open(source, size)
    release()
    spec = _described(opened.input, description or {})
    parameters = opened.network.parameters
    say("fusing")
    fused = fusion.fuse(opened.network, certified=True)
    opened = replace(opened, network=fused.network)  # the one before is not needed any more
    release()
    say("certifying")
    inputs = certification_inputs(spec)
    certificate = fusion.certify(opened.original, fused.network, inputs)
    check_apart(fused.network, inputs[-2:])
    notes = (*opened.notes, *_judge(certificate, DIFFERENT_STEPS if opened.quantized else DIFFERENT))
    manifest = {
        "name": name or _name(source),
        "format": opened.format,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": identity_on_disk(source, data) if isinstance(source, Path) else None,
        "input": spec.to_json(),
        "labels": list(opened.labels) if opened.labels else None,
        "classes": opened.classes,
        "outputs": [
            {"name": spec.name, "kind": spec.kind, "shape": list(spec.shape)}
            for spec in fused.network.outputs
        ],
        "parameters": parameters,
        "fusion": fused.report.to_json(),
        "certificate": certificate.to_json(),
        "layers": [
            {"name": layer.layer, "op": layer.op, "shape": layer.shape} for layer in fused.network.layers()
        ],
        "notes": list(notes),
    }
    del opened  # its runtime holds the weights once more
    release()
    say("writing")
    folder.mkdir(exist_ok=True)
    fusion.save(fused.network, folder, manifest)
    return manifest


def _open(source: str | Path, size: tuple[int, int] | None) -> "Opened":
    import models

    return models.open(source, size=size)


def _refuse(source: str | Path, refused: Sequence[str]) -> None:
    """Stop before a refused format is opened: opening TorchScript runs what is in it."""
    if not refused or not isinstance(source, Path):
        return
    from models.formats import detect

    found = detect(source).name
    if found in refused:
        raise FormatRefused(
            f"This server takes no {_CALLED.get(found, found)} files, because reading one can run code that is in "
            "it. Export the network as ONNX, which needs no setting; or, where everyone who uploads is trusted, set "
            "the server's CLEARFOLD_ALLOW_EXECUTABLE=true."
        )


def _described(spec: "InputSpec", description: dict[str, Any]) -> "InputSpec":
    from models.preprocess import InputSpec

    if not description:
        return spec
    merged = InputSpec.from_json({**spec.to_json(), **description})
    return replace(merged, size=spec.size)


def certification_inputs(spec: "InputSpec") -> list["Tensor"]:
    """Inputs to compare a fused network with its original on, the same on every run.

    They are what images of 8 bits become, from one colour to pure noise.
    """
    import torch
    from torch.nn.functional import interpolate

    from models.preprocess import bounds

    low, high = bounds(spec)
    random = torch.Generator().manual_seed(0)

    def image(index: int) -> "Tensor":
        grid = (min(2**index, spec.size[0]), min(2**index, spec.size[1]))
        blocks = (torch.rand((1, spec.channels, *grid), generator=random) * 255).round() / 255
        return low + (high - low) * interpolate(blocks, size=spec.size, mode="nearest")

    return [image(index) for index in range(CERTIFIED_ON)]


def check_apart(network: "Network", images: "Sequence[Tensor]") -> None:
    """Hold a network's answers for several images at once against those for each: a file for one image may leave open
    where its batch is, and then the runtime cannot tell. Raises NotEquivalent."""
    import torch

    import fusion

    def one_by_one(x: "Tensor") -> tuple["Tensor", ...]:
        answers = [network(image[None]) for image in x]
        columns = zip(*answers, strict=True) if isinstance(answers[0], tuple) else [answers]
        return tuple(torch.cat(list(column)) for column in columns)

    difference = fusion.certify(one_by_one, network, [torch.cat(list(images))]).max_relative
    if not difference <= DIFFERENT:  # also when it is NaN
        raise NotEquivalent(
            f"Its answer for an image depends on the images beside it: two at once differ by {difference:.2g} "
            "(relative) from one by one. Export the network in evaluation mode, with a dynamic batch dimension."
        )


def _judge(certificate: "Certificate", bound: float) -> tuple[str, ...]:
    difference = certificate.max_relative
    if not difference <= bound:  # also when it is NaN
        raise NotEquivalent(
            f"Read back, the network's outputs differ by {difference:.2g} (relative) from its "
            "own runtime's, so its explanations would be those of another network. Please report this file."
        )
    if difference > REMARKABLE:
        return (f"Outputs differ from the file's own runtime by up to {difference:.2g} (relative).",)
    return ()


def _name(source: str | Path) -> str:
    return source.stem if isinstance(source, Path) else source


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError("a size is HEIGHTxWIDTH, as 224x224")
    return int(match[1]), int(match[2] or match[1])


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.worker convert", description=__doc__)
    parser.add_argument("source", help="the model file")
    parser.add_argument("folder", type=Path, help="where to write the artefact")
    parser.add_argument("--zoo", action="store_true", help="the source is the name of a zoo network")
    parser.add_argument("--size", type=_size)
    parser.add_argument("--description", type=json.loads, help="the stated fields of the input, as JSON")
    parser.add_argument("--name")
    parser.add_argument("--refuse", action="append", default=[], metavar="FORMAT")
    parser.add_argument("--data", action="append", default=[], metavar="NAME", help="a data file beside it")
    return parser.parse_args(arguments)


def work(arguments: Sequence[str], say: Say) -> dict[str, Any]:
    """What the child process does; the manifest is in the folder."""
    options = _arguments(arguments)
    convert(
        options.source if options.zoo else Path(options.source),
        options.folder,
        size=options.size,
        description=options.description,
        name=options.name,
        refused=options.refuse,
        data=options.data,
        say=say,
    )
    return {}
