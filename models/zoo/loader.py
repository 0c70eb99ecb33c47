"""Networks by name: the built-in one, and the pretrained ones of an installed torchvision or timm."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Collection
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from fusion.errors import ClearfoldError
from models.formats.probing import first_line
from models.preprocess import InputSpec, Interpolation

if TYPE_CHECKING:
    from torch import nn

    from models.opened import Source

NAMES = 'a name ("builtin", "torchvision:NAME", "timm:NAME")'


class UnknownNetwork(ClearfoldError):
    """A network name that nothing here knows."""

    code = "unknown-network"


class ZooUnavailable(ClearfoldError):
    """A zoo that is not installed, or weights that can be neither found nor fetched."""

    code = "zoo-unavailable"


def is_zoo_name(name: str) -> bool:
    """Whether a string names a network of a zoo ("builtin", "torchvision:resnet18") rather than a file."""
    zoo, colon, _ = name.partition(":")
    return name == "builtin" or (bool(colon) and zoo in ZOOS and zoo != "builtin")


def load(name: str, *, size: tuple[int, int] | None = None) -> Source:
    """A zoo network with its weights, preprocessing and labels; `size` overrides the size it was trained on.

    Raises UnknownNetwork (with near names), ZooUnavailable (package or weights missing).
    """
    from dataclasses import replace

    from models.formats import module as modules

    zoo, _, network = name.partition(":")
    module, spec, labels = ZOOS[zoo](network)
    if size is not None:
        spec = replace(spec, size=size)
    found = modules.read(module, size=spec.size, channels=spec.channels)
    return replace(found, input=spec, labels=labels)


Loaded = tuple["nn.Module", InputSpec, tuple[str, ...] | None]


def _builtin(_: str) -> Loaded:
    from models.zoo import network

    if not network.WEIGHTS_FILE.is_file():
        raise ZooUnavailable(
            f"The built-in network's weights ({network.WEIGHTS_FILE.name}) are missing here. "
            "Install Clearfold again, or train them: python -m models.zoo.train."
        )
    channels, height, width = network.INPUT_SHAPE
    spec = InputSpec(size=(height, width), channels=channels, mean=network.MEAN, std=network.STD)
    return network.load_builtin(), spec, tuple(network.read_card()["classes"])


def _torchvision(name: str) -> Loaded:
    zoo = _package("torchvision").models
    _check_name("torchvision", name, zoo.list_models(module=zoo))
    weights = zoo.get_model_weights(name).DEFAULT
    module = _fetch("torchvision", name, lambda: zoo.get_model(name, weights=weights))
    transforms = weights.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    spec = InputSpec(
        size=(crop, crop),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resize="crop",
        crop_fraction=crop / resize,
        interpolation=transforms.interpolation.value,
    )
    return module, spec, tuple(weights.meta["categories"])


def _timm(name: str) -> Loaded:
    timm = _package("timm")
    architecture, _, tag = name.partition(".")
    _check_name("timm", architecture, timm.list_models())
    known = timm.list_pretrained(f"{architecture}.*") + timm.list_pretrained(architecture)
    if not known:
        raise UnknownNetwork(f"timm has no pretrained weights for '{architecture}'. Choose another network.")
    if tag:
        _check_name("timm", name, known)
    module = _fetch("timm", name, lambda: timm.create_model(name, pretrained=True))
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    interpolation = config["interpolation"]
    spec = InputSpec(
        size=(height, width),
        channels=channels,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize="squash" if config.get("crop_mode") == "squash" else "crop",
        crop_fraction=config["crop_pct"],
        interpolation=interpolation if interpolation in get_args(Interpolation) else "bicubic",
    )
    return module, spec, _imagenet_labels(timm, module)


def _imagenet_labels(timm: ModuleType, module: Any) -> tuple[str, ...] | None:
    """The class names of ImageNet and its subsets, which timm knows by their number of classes."""
    subset = timm.data.infer_imagenet_subset(module)
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


# One entry per zoo: the part of the name after the colon -> (module, input description, labels).
ZOOS: dict[str, Callable[[str], Loaded]] = {"builtin": _builtin, "torchvision": _torchvision, "timm": _timm}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ZooUnavailable(
            f"{name} is not installed, so its networks cannot be opened. Run: pip install 'clearfold[zoo]'."
        ) from error


def _check_name(zoo: str, name: str, known: Collection[str]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else f"Name one of its {len(known)} networks."
    raise UnknownNetwork(f"{zoo} has no classifier '{name}'. {hint}")


def _fetch(zoo: str, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build().eval()
    except Exception as error:  # no network, a damaged checkpoint: every library has its own type
        raise ZooUnavailable(
            f"The pretrained weights of {zoo}:{name} can be neither found nor fetched "
            f"({first_line(error)}). Check the network connection, or put "
            f"the checkpoint into {zoo}'s cache ({_CACHES[zoo]}); a damaged one must be deleted there."
        ) from error


_CACHES = {
    "torchvision": "$TORCH_HOME/hub/checkpoints, by default ~/.cache/torch/hub/checkpoints",
    "timm": "$HF_HOME/hub, by default ~/.cache/huggingface/hub",
}
