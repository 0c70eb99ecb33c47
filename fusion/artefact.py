"""The stored form of a network: graph.json, weights.safetensors, manifest.json; loading it runs no foreign code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from fusion.errors import ArtefactError, UnsupportedOperator
from fusion.network import Network, check_finite, is_path
from fusion.operators import is_allowed, operator_for, operator_key
from fusion.outputs import KINDS
from fusion.versions import VERSION, upgrade_graph, upgrade_manifest

GRAPH, WEIGHTS, MANIFEST = "graph.json", "weights.safetensors", "manifest.json"
_MAX_NODES = 200_000
# What reading a graph ends with that nobody has written.
_DAMAGED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    RuntimeError,
    RecursionError,
    AssertionError,
)

# Torch values that may stand among a call's arguments, by their stored kind.
_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def save(network: Network, folder: Path, manifest: dict[str, Any]) -> None:
    """Write a network into an existing folder. Raises UnsupportedOperator for an operator off the list."""
    for node in network.graph.nodes:
        if node.op == "call_function" and not is_allowed(node.target):
            raise UnsupportedOperator(operator_key(node.target), str(node.meta.get("layer", "")))
    nodes = [_encode_node(node) for node in network.graph.nodes]
    weights = {name: t.detach().cpu().contiguous().clone() for name, t in network.constants.items()}
    save_file(weights, folder / WEIGHTS)
    (folder / GRAPH).write_text(json.dumps({"version": VERSION, "nodes": nodes}, allow_nan=False))
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, **manifest}, allow_nan=False, indent=1))


def load(folder: Path) -> tuple[Network, dict[str, Any]]:
    """Read a network and its manifest, of this version or an older one. Raises ArtefactError for whatever is missing,
    damaged or of a newer version."""
    manifest, stored = load_manifest(folder), upgrade_graph(_read_json(folder / GRAPH), GRAPH)
    constants = _read_weights(folder / WEIGHTS)
    try:
        graph = _decode_graph(stored["nodes"], constants)
    except _DAMAGED as error:
        raise ArtefactError(f"{GRAPH} is damaged ({error!r}). Upload the network again.") from error
    return Network(graph, constants), manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    """Only the manifest, for listings."""
    return upgrade_manifest(_read_json(folder / MANIFEST), MANIFEST)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path.name} cannot be read ({error}). Upload the network again.") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path.name} is damaged. Upload the network again.")
    return value


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path.name} cannot be read ({error}). Upload the network again.") from error
    check_finite(weights, folded=True)
    return weights


def _encode_node(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        entry["target"] = operator_key(node.target)
    elif node.op == "get_attr":
        entry["target"] = str(node.target)
    if node.args:
        entry["args"] = _encode(node.args)
    if node.kwargs:
        entry["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
    for key in ("names", "kinds"):
        if node.op == "output" and node.meta.get(key):
            entry[key] = list(node.meta[key])
    if node.meta.get("layer"):
        entry["layer"] = node.meta["layer"]
    if node.meta.get("shape") is not None:
        entry["shape"] = list(node.meta["shape"])
        entry["dtype"] = _bare(node.meta["dtype"])
    return entry


def _bare(value: object) -> str:
    return str(value).removeprefix("torch.")


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # where a network runs is decided when it is used
    for kind, cls in _KINDS.items():
        if isinstance(value, cls):
            return {kind: _bare(value)}
    raise ArtefactError(f"An argument of type {type(value).__name__} cannot be stored.")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device("cpu")
    decoded = getattr(torch, content)
    if not isinstance(decoded, _KINDS[kind]):
        raise ValueError(f"{content} is no {kind}")
    return decoded


def _output_meta(entry: dict[str, Any]) -> dict[str, Any]:
    """What a stored graph says of its outputs; older ones say nothing."""
    values = entry["args"][0] if isinstance(entry["args"][0], list) else entry["args"]
    found: dict[str, Any] = {}
    for key in ("names", "kinds"):
        if key in entry:
            found[key] = tuple(entry[key])
            if len(found[key]) != len(values):
                raise ValueError(f"{len(values)} outputs have {len(found[key])} {key}")
    if any(kind not in (None, *KINDS) for kind in found.get("kinds", ())):
        raise ValueError("unknown kind of output")
    if len(set(found.get("names", ()))) != len(found.get("names", ())):
        raise ValueError("two outputs have one name")
    return found


def _decode_graph(entries: list[dict[str, Any]], constants: dict[str, Tensor]) -> fx.Graph:
    if len(entries) > _MAX_NODES:
        raise ArtefactError(f"{GRAPH} has {len(entries)} nodes; at most {_MAX_NODES} are run.")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in entries:
        op, name = entry["op"], entry["name"]
        for text in (name, *entry.get("kwargs", {})):  # they are written into source code
            if not is_path(text) or "." in text:
                raise ValueError("a name that is none of Python's")
        args = tuple(_decode(entry.get("args", []), nodes))
        kwargs = {key: _decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
        if op == "placeholder":
            node = graph.create_node("placeholder", name, name=name)
        elif op == "get_attr":
            if entry["target"] not in constants:
                raise ArtefactError(
                    f"{WEIGHTS} lacks the constant '{entry['target']}'. Upload the network again."
                )
            node = graph.create_node("get_attr", entry["target"], name=name)
        elif op == "call_function":
            node = graph.create_node("call_function", operator_for(entry["target"]), args, kwargs, name=name)
        elif op == "output":
            node = graph.output(args[0] if not isinstance(args[0], list) else tuple(args[0]))
        else:
            raise ValueError(f"unknown kind of node {op}")
        shape = entry.get("shape")
        node.meta = {
            "layer": str(entry.get("layer", "")),
            "shape": None if shape is None else tuple(shape),
            "dtype": getattr(torch, entry["dtype"]) if shape is not None else None,
        }
        if op == "output":
            node.meta |= _output_meta(entry)
        nodes[name] = node
    graph.lint()
    return graph
