"""The methods by name: LRP, and those that captum computes for comparison, with the options that each takes."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app import composites
from fusion.errors import BadComposite
from lrp.attributions import METHODS, footprint, windows
from lrp.explainer import Explainer

LRP = "LRP"
DEFAULT = LRP

# Of one image, for one explanation: what a server does for whoever asks.
MOST_RUNS = 1000

Kind = Literal["integer", "number", "size", "choice", "layer"]


class WrongOption(ValueError):
    """An option that a method does not take, or a value that it may not have; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Option:
    """What one option of a method may be. A size is a number of pixels, or HEIGHTxWIDTH; its bounds hold for both."""

    type: Kind
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """The value that a text (or a number) stands for. Raises ValueError that says what it must be."""
        return _READERS[self.type](self, value)


@dataclass(frozen=True)
class Method:
    """A method in words, and its options."""

    description: str
    options: Mapping[str, Option]


_BASELINE = Option("number", "What stands for no image, in the units of the network's input", -1e6, 1e6)
_BATCH = Option(
    "integer", "Images computed at once, fewer where they are too large; it changes no value", 1, 64
)

_METHODS: dict[str, Method] = {
    LRP: Method(
        "Layer-wise relevance propagation by a composite of rules, with a ledger of every unit; its parameters are "
        "those of the composite, see GET /v1/composites.",
        {},
    ),
    "IntegratedGradients": Method(
        "The mean gradient on the way from a baseline to the image, times their difference: the sum is the change of "
        "the score.",
        {
            "baseline": _BASELINE,
            "n_steps": Option("integer", "Points on the way", 2, MOST_RUNS),
            "rule": Option(
                "choice",
                "How the points are placed and weighed",
                choices=("gausslegendre", "riemann_trapezoid", "riemann_middle"),
            ),
            "batch": _BATCH,
        },
    ),
    "SmoothGrad": Method(
        "The mean gradient of noisy copies of the image: to what the score is sensitive.",
        {
            "samples": Option("integer", "Noisy copies", 1, MOST_RUNS),
            "noise": Option("number", "Standard deviation, as a share of the image's range", 0, 10),
            "seed": Option("integer", "The same seed is the same noise", 0, 2**32 - 1),
            "batch": _BATCH,
        },
    ),
    "InputXGradient": Method("The image times the gradient of the score.", {}),
    "GuidedBackprop": Method(
        "The gradient, of which only the positive part passes a ReLU: for networks with ReLUs.", {}
    ),
    "Occlusion": Method(
        "By how much the score falls when a window of the image is covered.",
        {
            "window": Option("size", "Pixels; an eighth of the image where none is given", 1, 8192),
            "stride": Option("size", "Pixels; half a window where none is given", 1, 8192),
            "baseline": _BASELINE,
            "batch": _BATCH,
        },
    ),
    "GradCAM": Method(
        "The maps of a late layer, weighed by their mean gradients: coarse, and of what speaks for the class alone.",
        {
            "layer": Option("layer", "Whose maps; the last layer with maps where none is given"),
            "interpolate": Option(
                "choice", "How the map is enlarged to the image", choices=("bilinear", "nearest")
            ),
        },
    ),
}

# What a question may have beside its target where LRP answers it, and what is wrong with it elsewhere.
_OF_LRP = {
    "composite": "a composite is a set of LRP's rules",
    "layer": "only LRP looks at the relevance of a layer",
    "top": "only LRP looks at the relevance of a layer's channels",
    "through": "only LRP's relevance passes through layers",
}


def names() -> tuple[str, ...]:
    return tuple(_METHODS)


def of(name: str) -> Method:
    """Raises BadComposite."""
    if name not in _METHODS:
        raise BadComposite(f"There is no method {name[:80]!r}: choose one of {', '.join(_METHODS)}.")
    return _METHODS[name]


def defaults(name: str) -> dict[str, Any]:
    """The options that a method takes, with the library's defaults. Raises BadComposite."""
    signature = {} if name == LRP else inspect.signature(METHODS[name]).parameters
    return {option: signature[option].default for option in of(name).options}


def read(
    name: str, stated: Mapping[str, Any], composite: str = composites.DEFAULT, also: Collection[str] = ()
) -> dict[str, Any]:
    """The options of a method, those of the composite for LRP, from texts or numbers. also: other words that may be
    meant by one that is unknown. Raises BadComposite and WrongOption."""
    method = of(name)
    known = _of_composite(composite) if name == LRP else method.options
    found = {}
    for option, value in stated.items():
        if option not in known:
            raise WrongOption(option, _not_of(name, option, (*also, *known)))
        try:
            found[option] = known[option].read(value)
        except ValueError as error:
            raise WrongOption(option, str(error)) from None
    return found


def refuse_others(name: str, given: Collection[str]) -> None:
    """Refuse what only LRP takes where another method is asked for. given: the names of what was asked for. Raises
    BadComposite and WrongOption."""
    method = of(name)
    for field, reason in _OF_LRP.items():
        if name != LRP and field in given and field not in method.options:
            raise WrongOption(
                field, f"{reason}, {name} has nothing like it: leave {field} out, or take method={LRP}"
            )


@dataclass(frozen=True)
class Limits:
    """What one explanation may take of the machine: bytes for what is computed at once (about), and seconds, None for
    as long as it takes."""

    memory: int = 2**31
    seconds: float | None = None


PATIENT = Limits()


def fitted(name: str, options: Mapping[str, Any], explainer: Explainer, limits: Limits) -> dict[str, Any]:
    """All options of a method for this network: what was asked for, else the defaults, in batches that fit into memory.
    Raises BadComposite where it would run the network too often, BadLayer where it has no layer to look at."""
    found = {**defaults(name), **options}
    if "batch" in found:
        found["batch"] = max(1, min(found["batch"], limits.memory // max(1, footprint(explainer.network))))
    if "layer" in found and found["layer"] is None:
        found["layer"] = explainer.cam_layer
    shape = explainer.network.inputs[0].shape
    if "window" in found and len(shape) == 4:
        height, width = shape[2:]
        assert height is not None
        assert width is not None
        found["window"], found["stride"], runs = windows((height, width), found["window"], found["stride"])
        if runs > MOST_RUNS:
            raise BadComposite(
                f"{name} would run the network {runs} times, once a window, and may {MOST_RUNS} times: take a larger "
                "stride or window."
            )
    return found


def _of_composite(composite: str) -> dict[str, Option]:
    return {name: Option("number", "") for name in composites.parameters(composite)}


def _not_of(name: str, option: str, known: Collection[str]) -> str:
    owners = [other for other, method in _METHODS.items() if option in method.options]
    if owners:
        return f"this belongs to {' and '.join(owners)}: take method={owners[0]}, or leave {option} out"
    if name != LRP and any(option in composites.parameters(c) for c in composites.names()):
        return f"this belongs to composites, and {name} has none: take method={LRP}, or leave {option} out"
    return f"there is no such parameter, but {', '.join(known)}" if known else f"{name} takes no parameters"


# --- reading --------------------------------------------------------------------------------------------------------
def _number(option: Option, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("this must be a number")
    return _bounded(option, number)


def _integer(option: Option, value: Any) -> int:
    try:
        return int(_bounded(option, int(str(value))))
    except ValueError:
        raise ValueError(f"this must be a whole number{_bounds(option)}") from None


def _size(option: Option, value: Any) -> tuple[int, int]:
    height, x, width = str(value).partition("x")
    try:
        return _integer(option, height), _integer(option, width if x else height)
    except ValueError:
        raise ValueError(f"this must be a whole number{_bounds(option)}, or HEIGHTxWIDTH") from None


def _choice(option: Option, value: Any) -> str:
    if value not in option.choices:
        raise ValueError(f"this must be one of {', '.join(option.choices)}")
    return str(value)


def _layer(option: Option, value: Any) -> str:
    return str(value)


_READERS: dict[Kind, Callable[[Option, Any], Any]] = {
    "integer": _integer,
    "number": _number,
    "size": _size,
    "choice": _choice,
    "layer": _layer,
}


def _bounded(option: Option, number: float) -> float:
    low, high = option.minimum, option.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"this must be a number{_bounds(option)}")
    return number


def _bounds(option: Option) -> str:
    if option.minimum is None or option.maximum is None:
        return ""
    return f" from {option.minimum:.15g} to {option.maximum:.15g}"
