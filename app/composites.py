"""The composites by name, with what they can be told and what they take from the network's input."""

import inspect
from collections.abc import Callable, Mapping

from fusion.errors import BadComposite
from lrp.auto import AUTO
from lrp.composites import COMPOSITES, DEFAULT, Composite, build
from models.preprocess import InputSpec, bounds

__all__ = ["AUTO", "DEFAULT", "describe", "names", "parameters", "rules"]

# Parameters that a composite takes from the network's input description, so nobody has to state them.
_FROM_INPUT = ("low", "high")


def _auto() -> str:
    """Whichever suits the network, by the layers that it has; the answer says which was picked, and why."""
    return AUTO


_FACTORIES: dict[str, Callable[..., Composite | str]] = {**COMPOSITES, AUTO: _auto}


def names() -> tuple[str, ...]:
    return tuple(_FACTORIES)


def describe(name: str) -> str:
    """What a composite is, in a line."""
    return (_factory(name).__doc__ or "").strip().partition("\n")[0]


def parameters(name: str) -> dict[str, float]:
    """What a composite can be told, with the defaults. Raises BadComposite."""
    signature = inspect.signature(_factory(name))
    return {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if key not in _FROM_INPUT and isinstance(parameter.default, float)
    }


def rules(name: str, stated: Mapping[str, float], spec: InputSpec) -> Composite | str:
    """The composite for networks that take such an input: "auto" stays a word, since only the explainer sees the
    network's graph. Raises BadComposite."""
    known = parameters(name)
    unknown = sorted(set(stated) - set(known))
    if unknown:
        choice = f"it takes {', '.join(known)}" if known else "it takes none"
        raise BadComposite(f"{name} has no parameter {unknown[0]!r}: {choice}.")
    if name == AUTO:
        return AUTO
    wanted = inspect.signature(_factory(name)).parameters
    given = {key: value for key, value in zip(_FROM_INPUT, bounds(spec), strict=True) if key in wanted}
    return build(name, **stated, **given)


def _factory(name: str) -> Callable[..., Composite | str]:
    if name not in _FACTORIES:
        raise BadComposite(f"There is no composite {name[:80]!r}: choose one of {', '.join(_FACTORIES)}.")
    return _FACTORIES[name]
