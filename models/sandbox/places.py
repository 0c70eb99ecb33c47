"""What a confined process may read and write: the libraries it runs on, its file, one folder, and no more."""

import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# The system's libraries, and what they look at to know the machine. Nothing here is anybody's data.
_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime"),
    *("/etc/ssl/openssl.cnf", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat"),
    "/proc/sys/vm/overcommit_memory",
    *("/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm/transparent_hugepage"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)
_DEVICES = ("/dev/null",)  # to write to
# Names, certificates and time zones, for what is downloaded.
_NETWORK = ("/etc", "/run/systemd/resolve", "/run/resolvconf", "/var/lib/ca-certificates")
_LIBRARIES = ("site-packages", "dist-packages", "lib-dynload")
_OURS = ("fusion", "lrp", "models")


@dataclass(frozen=True)
class Profile:
    """What one kind of work needs. Paths that do not exist are no harm."""

    readable: tuple[Path, ...] = field(default=())
    writable: tuple[Path, ...] = field(default=())
    network: bool = False


def for_file(readable: Iterable[Path], writable: Iterable[Path]) -> Profile:
    """Work on files or folders from outside, which are read, with results in others."""
    return Profile((*libraries(), *readable), (*map(Path, _DEVICES), *writable))


def for_zoo(readable: Iterable[Path], writable: Iterable[Path]) -> Profile:
    """A network by name: no file from outside, but caches that are read and filled, and their download."""
    certificates = [Path(os.environ[name]) for name in ("SSL_CERT_FILE",) if name in os.environ]
    return Profile(
        (*libraries(), *map(Path, _NETWORK), *certificates, *readable),
        (*map(Path, _DEVICES), *_caches(), *writable),
        network=True,
    )


def libraries() -> tuple[Path, ...]:
    """Where the interpreter, the installed packages and the system's libraries are."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [path for path in sys.path if Path(path).name in _LIBRARIES or path.endswith(".zip")]
    found += [str(Path(prefix) / "lib") for prefix in (sys.prefix, sys.base_prefix)]
    found += [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    ours = Path(__file__).resolve().parents[2]
    return tuple(dict.fromkeys((*map(Path, _SYSTEM), *map(Path, found), *(ours / name for name in _OURS))))


def _caches() -> tuple[Path, ...]:
    """Where torchvision and timm keep what they download; made, so that it can be granted."""
    home = Path(os.environ.get("HOME", "/nonexistent"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    places = (
        Path(os.environ.get("TORCH_HOME", cache / "torch")),
        Path(os.environ.get("HF_HOME", cache / "huggingface")),
    )
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue  # it can be read if it is there
    return places
