"""Confines this process: limits, privileges, Landlock and seccomp, each as far as the system has it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.sandbox import landlock, limits, privileges, seccomp
from models.sandbox.kernel import Machine, Syscall, Unavailable, machine, syscall
from models.sandbox.limits import Limits
from models.sandbox.places import Profile

_log = logging.getLogger(__name__)


class ThreadsRunning(RuntimeError):
    """Confinement came too late: a thread that runs already would stay free."""


@dataclass(frozen=True)
class Confinement:
    """What holds a process, and why what is `missing` does not."""

    layers: dict[str, str]
    missing: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"layers": self.layers, "missing": self.missing}


def confine(profile: Profile, bounds: Limits, call: Syscall = syscall) -> Confinement:
    """From here on, for good: this process opens, uses and calls only what the profile and the bounds allow.

    Call it before any thread is started and before anything from outside is looked at. A layer that the system
    lacks is left out with a warning in the log.
    """
    if _threads() > 1:
        raise ThreadsRunning("confine() must come before any thread")
    held = limits.apply(bounds)
    layers: dict[str, str] = {}
    missing: dict[str, str] = {}
    # In this order: the filter denies the calls that the layers before it are made by.
    for name, restrict in _LAYERS.items():
        try:
            layers[name] = restrict(machine(), profile, call)
        except Unavailable as error:
            missing[name] = str(error)
            _log.warning("no %s: %s; the conversion is less confined", name, error)
    return Confinement({**layers, "limits": ", ".join(held)}, missing)


def _privileges(machine: Machine, profile: Profile, call: Syscall) -> str:
    privileges.drop(machine, call)
    return "dropped"


def _landlock(machine: Machine, profile: Profile, call: Syscall) -> str:
    abi = landlock.restrict(
        machine, call, readable=profile.readable, writable=profile.writable, network=profile.network
    )
    return f"ABI {abi}"


def _seccomp(machine: Machine, profile: Profile, call: Syscall) -> str:
    seccomp.restrict(machine, call, network=profile.network)
    return "with network" if profile.network else "no network"


_LAYERS: dict[str, Callable[[Machine, Profile, Syscall], str]] = {
    "privileges": _privileges,
    "landlock": _landlock,
    "seccomp": _seccomp,
}


def _threads() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return 1
