"""Networks with data files, changed at random: read or refused, and what is read is what the wire was seen to name."""

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from benchmarks.fuzz.mutations import BYTES_CHANGED, MESSAGES_CHANGED
from fusion.errors import ClearfoldError
from models.beside import plain
from models.scan.external import embed
from models.scan.locations import data_files
from models.scan.onnx import check, parse
from models.scan.tensors import tensors


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """With a data file for each of its tensors, two of them constants of nodes."""
    values = [np.arange(n + 1, dtype=np.float32) for n in range(5)]
    nodes = [
        helper.make_node("Constant", [], [f"c{i}"], value=numpy_helper.from_array(value, f"k{i}"))
        for i, value in enumerate(values[:2])
    ]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Sum", ["x", "c0", "c1", "w0"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(value, f"w{i}") for i, value in enumerate(values[2:])],
    )
    path = tmp_path / "net.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
        convert_attribute=True,
    )
    assert len(data_files(path)) == 5
    return path


def test_every_change_is_read_or_refused(network: Path) -> None:
    original, outcomes = network.read_bytes(), Counter[str]()
    for seed in range(1500):
        random = Random(seed)
        data = random.choice(MESSAGES_CHANGED if seed % 3 else BYTES_CHANGED)(original, random)
        if data and seed % 2:
            data = random.choice(BYTES_CHANGED)(data, random)
        network.write_bytes(data)
        named = data_files(network)
        try:
            proto = parse(data, network.name)
            external = [tensor for tensor in tensors(proto) if tensor.data_location == tensor.EXTERNAL]
            places = {plain(e.value) for t in external for e in t.external_data if e.key == "location"}
            embed(proto, network.parent, network.name)
            outcomes["gathered"] += 1
            assert places <= {*named, network.name}
            check(proto, network.name)
        except ClearfoldError as error:
            outcomes[error.code] += 1
    assert {"gathered", "bad-file", "missing-data"} <= set(outcomes)
