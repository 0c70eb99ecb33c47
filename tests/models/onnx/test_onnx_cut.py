"""Networks whose ends no relevance comes back through are cut in front of them, by themselves and with a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from onnx_files import array, build, ints, relative
from torch import Tensor, nn

import fusion
import lrp
import models
from fusion.errors import BadFile, UnsupportedOperator
from models.formats.onnx import OnnxSource, read
from models.formats.onnx.excerpt import excerpt

Save = Callable[[onnx.ModelProto], Path]
node = helper.make_node

# Images [N, 3, 8, 8]: rows [N, 4 + 3, 64] of a box (two corners) and three scores for each place.
HEAD = [
    node("Conv", ["x", "stem"], ["c"], pads=[1, 1, 1, 1]),
    node("Relu", ["c"], ["f"]),
    node("Conv", ["f", "head"], ["h"]),
    node("Reshape", ["h", "rows"], ["r"]),
    node("Split", ["r", "parts"], ["coordinates", "logits"], axis=1),
    node("Transpose", ["coordinates"], ["boxes"], perm=[0, 2, 1]),
    node("Sigmoid", ["logits"], ["scores"]),
]
WEIGHTS = {
    "stem": array(6, 3, 3, 3, seed=1),
    "head": 3 * array(7, 6, 1, 1, seed=2),
    "rows": ints(0, 7, -1),
    "parts": ints(4, 3),
    "most": ints(5),
    "overlap": np.array([0.5], np.float32),
    "least": np.array([0.6], np.float32),
    "half": np.float32(0.5),
    "zero": np.float32(0),
    "first": ints(0),
}


def detector(
    last: Sequence[onnx.NodeProto],
    outputs: Sequence[str] = ("y",),
    batch: int | str = "N",
    domains: Sequence[str] = (),
    **weights: np.ndarray[Any, Any],
) -> onnx.ModelProto:
    model = build([*HEAD, *last], (batch, 3, 8, 8), {**WEIGHTS, **weights}, domains=domains)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return model


def cut_at(source: OnnxSource, *names: str, why: str) -> None:
    """The outputs and what is said of them; they are what the file's own runtime computes, for any batch, and what the
    captured network does."""
    assert source.output_names == names
    assert any(why in note and all(f"'{name}'" in note for name in names) for note in source.notes)
    x = torch.randn(3, *source.example.shape[1:], generator=torch.Generator().manual_seed(0))
    network = fusion.capture(source.module, (source.example,))
    many = len(names) > 1
    want, got, captured = source.original(x), source.module(x), network(x)
    for i, name in enumerate(names):
        wanted, found = (want[name], got[name]) if many else (want, got)
        assert wanted.shape[0] == 3
        assert relative(found, wanted) < 1e-5
        assert relative(captured[i] if many else captured, found) < 1e-6


SUPPRESSED = node(
    "NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["y"], name="NonMaxSuppression_12"
)


@pytest.mark.parametrize("batch", ["N", 1])
def test_suppression_at_the_end(save: Save, batch: int | str) -> None:
    source = read(save(detector([SUPPRESSED], batch=batch)))
    cut_at(source, "scores", "boxes", why="everything behind 'NonMaxSuppression_12' is left off: how much")


def test_rows_that_are_turned_for_suppression_are_meant_as_they_were(save: Save) -> None:
    """The other order of its scores puts classes where labels are looked for."""
    turned = [
        node("Transpose", ["scores"], ["rows_of_scores"], perm=[0, 2, 1]),
        node("Transpose", ["rows_of_scores"], ["classes_first"], perm=[0, 2, 1]),
        node("NonMaxSuppression", ["boxes", "classes_first", "most", "overlap", "least"], ["y"]),
    ]
    cut_at(read(save(detector(turned))), "rows_of_scores", "boxes", why="NonMaxSuppression")


@pytest.mark.parametrize(
    ("domain", "op"),
    [("TRT", "EfficientNMS_TRT"), ("mmdeploy", "TRTBatchedNMS"), ("com.microsoft", "DetectionPostProcess")],
)
def test_suppression_of_another_domain(save: Save, domain: str, op: str) -> None:
    """The runtime does not know it either, and is not asked to."""
    outputs = ["count", "kept", "best", "classes"]
    last = node(op, ["boxes", "scores"], outputs, name="end", domain=domain)
    source = read(save(detector([last], outputs, domains=[domain])))
    cut_at(source, "scores", "boxes", why="everything behind 'end' is left off: it chooses among boxes")


def test_what_is_picked_by_the_result_is_what_is_explained(save: Save) -> None:
    """Scores above a bound, the best of these, and their boxes; the number of the best class is one of its score."""
    last = [
        node("Transpose", ["scores"], ["turned"], perm=[0, 2, 1]),
        node("ReduceMax", ["turned"], ["best"], axes=[2], keepdims=0),
        node("ArgMax", ["turned"], ["label"], axis=2, keepdims=0),
        node("Greater", ["best", "half"], ["above"]),
        node("NonZero", ["above"], ["places"]),
        node("Transpose", ["places"], ["index"]),
        node("GatherND", ["boxes", "index"], ["kept"]),
        node("GatherND", ["best", "index"], ["kept_scores"]),
        node("GatherND", ["label", "index"], ["kept_labels"]),
    ]
    outputs = ["kept", "kept_scores", "kept_labels"]
    cut_at(read(save(detector(last, outputs))), "turned", "boxes", why="'NonZero -> places' is left off")


def test_parts_of_one_tensor_are_one_output(save: Save) -> None:
    """Class by class, as torchvision's detectors choose."""
    last = []
    for c in range(3):
        last += [
            node("Gather", ["scores", f"class_{c}"], [f"s{c}"], axis=1),
            node("Greater", [f"s{c}", "half"], [f"above{c}"]),
            node("NonZero", [f"above{c}"], [f"places{c}"]),
            node("Transpose", [f"places{c}"], [f"index{c}"]),
            node("GatherND", [f"s{c}", f"index{c}"], [f"kept{c}"]),
            node("GatherND", ["boxes", f"index{c}"], [f"boxes{c}"]),
        ]
    last += [
        node("Concat", [f"{what}{c}" for c in range(3)], [f"all_{what}"], axis=0)
        for what in ("kept", "boxes")
    ]
    weights = {f"class_{c}": np.array(c) for c in range(3)}
    source = read(save(detector(last, ["all_kept", "all_boxes"], **weights)))
    cut_at(source, "scores", "boxes", why="and 2 other operators is left off")


def test_features_that_are_pooled_at_the_chosen_boxes_are_no_output(save: Save) -> None:
    last = [
        SUPPRESSED,
        node("Gather", ["y", "column"], ["which"], axis=1),
        node("Gather", ["y", "sample"], ["image"], axis=1),
        node("Squeeze", ["boxes", "first"], ["of_one"]),
        node("Gather", ["of_one", "which"], ["regions"], axis=0),
        node("RoiAlign", ["f", "regions", "image"], ["pooled"], output_height=2, output_width=2),
        node("ReduceMean", ["pooled"], ["z"], axes=[2, 3], keepdims=0),
    ]
    source = read(save(detector(last, ["z"], batch=1, column=np.array(2), sample=np.array(0))))
    cut_at(source, "scores", "boxes", why="'NonMaxSuppression_12'")


def test_a_count_that_is_computed(save: Save) -> None:
    last = [
        node("ReduceMax", ["scores"], ["best"], axes=[1], keepdims=0),
        node("Greater", ["best", "half"], ["above"]),
        node("Cast", ["above"], ["ones"], to=TensorProto.INT64),
        node("ReduceSum", ["ones"], ["all"], keepdims=0),
        node("Reshape", ["all", "one"], ["k"]),
        node("TopK", ["best", "k"], ["y", "where"], axis=1, name="best_of"),
    ]
    cut_at(read(save(detector(last, ["y", "where"], one=ints(1)))), "best", why="'best_of' is left off")


def test_a_branch_that_depends_on_pixels(save: Save) -> None:
    """Suppression only where there is something to suppress."""
    some = helper.make_graph([SUPPRESSED], "some", [], [helper.make_empty_tensor_value_info("y")])
    nothing = node("Constant", [], ["none"], value=helper.make_tensor("none", TensorProto.INT64, [0, 3], []))
    none = helper.make_graph([nothing], "none", [], [helper.make_empty_tensor_value_info("none")])
    last = [
        node("ReduceMax", ["scores"], ["best"], keepdims=0),
        node("Greater", ["best", "half"], ["any"]),
        node("If", ["any"], ["z"], then_branch=some, else_branch=none, name="If_3"),
    ]
    source = read(save(detector(last, ["z"])))
    cut_at(
        source,
        "scores",
        "boxes",
        why="everything behind 'If_3' is left off: its course depends on pixel values",
    )


@pytest.mark.parametrize("as_float", [False, True])
def test_the_number_of_the_best_class(save: Save, as_float: bool) -> None:
    """A segmenter that answers in class numbers, whichever type they have."""
    last = [
        node("Conv", ["f", "classes"], ["maps"]),
        node("ArgMax", ["maps"], ["numbers"], axis=1, keepdims=0, name="ArgMax_7"),
        node("Cast", ["numbers"], ["y"], to=TensorProto.FLOAT if as_float else TensorProto.INT32),
    ]
    source = read(save(detector(last, classes=array(4, 6, 1, 1, seed=5))))
    cut_at(source, "maps", why="everything behind 'ArgMax_7' is left off: no relevance")


def test_outputs_beside_those_behind_are_kept_as_they_are(save: Save) -> None:
    source = read(save(detector([SUPPRESSED], ["y", "logits"])))
    assert source.output_names == ("logits",)
    assert not source.original.inner  # type: ignore[attr-defined]


def test_what_is_quantized_in_front_of_the_cut(save: Save) -> None:
    last = [
        node("QuantizeLinear", ["scores", "step", "middle"], ["q"]),
        node("DequantizeLinear", ["q", "step", "middle"], ["rounded"]),
        node("NonMaxSuppression", ["boxes", "rounded", "most", "overlap", "least"], ["y"]),
    ]
    weights = {"step": np.float32(1 / 255), "middle": np.array(0, np.uint8)}
    cut_at(read(save(detector(last, **weights))), "rounded", "boxes", why="NonMaxSuppression")


def test_an_unknown_operator_in_the_middle_is_refused_still(save: Save) -> None:
    """In front of a suppression as well: what it reads is not what anybody asked for."""
    last = [
        node("Decode", ["boxes"], ["decoded"], domain="com.example", name="decode"),
        node("NonMaxSuppression", ["decoded", "scores", "most", "overlap", "least"], ["y"]),
    ]
    with pytest.raises(UnsupportedOperator, match=r"com\.example::Decode .*without custom ones"):
        read(save(detector(last, domains=["com.example"])))


def test_a_choice_among_the_pixels_themselves_is_refused(save: Save) -> None:
    nodes = [node("Greater", ["x", "zero"], ["above"]), node("NonZero", ["above"], ["y"])]
    with pytest.raises(UnsupportedOperator, match="depends on pixel values"):
        read(save(build(nodes, ("N", 3, 4, 4), {"zero": np.float32(0)})))


def test_a_size_that_depends_on_pixels_only_is_refused(save: Save) -> None:
    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["i"], to=TensorProto.INT64),
        node("Unsqueeze", ["i", "first"], ["s"]),
        node("Reshape", ["x", "s"], ["y"]),
    ]
    with pytest.raises(BadFile, match="pixel values"):
        read(save(build(nodes, ("N", 3, 4, 4), {"first": ints(0)})))


def test_an_excerpt_has_what_leads_to_its_outputs_only(save: Save) -> None:
    data = detector([SUPPRESSED]).SerializeToString()
    part = onnx.load_from_string(excerpt(data, ["logits"]))
    assert [o.name for o in part.graph.output] == ["logits"]
    assert [n.op_type for n in part.graph.node] == ["Conv", "Relu", "Conv", "Reshape", "Split"]


class Detector(nn.Module):
    """Scores and boxes for each of 64 places; the good ones of the first image, those that overlap left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        nn.init.normal_(self.classes.weight, std=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x)
        scores = self.classes(y).flatten(2).transpose(1, 2).softmax(-1)
        corner, size = self.boxes(y).flatten(2).transpose(1, 2).split(2, -1)
        boxes, scores = torch.cat([corner, corner + size.exp()], -1)[0], scores[0]
        best, labels = scores[:, 1:].max(-1)
        keep = torch.where(best > 0.3)[0]
        boxes, best, labels = boxes[keep], best[keep], labels[keep]
        keep = torchvision.ops.nms(boxes, best, 0.5)
        return boxes[keep], best[keep], labels[keep]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_detector_by_either_exporter(tmp_path: Path, dynamo: bool) -> None:
    """It takes the batch axis off, and still a batch of any size runs; its scores are explained to the last unit."""
    path = tmp_path / "net.onnx"
    version = {} if dynamo else {"opset_version": 17}
    names = {"input_names": ["images"], "output_names": ["boxes", "scores", "labels"]}
    torch.onnx.export(
        Detector().eval(), (torch.randn(1, 3, 16, 16),), path, dynamo=dynamo, **names, **version
    )
    source = read(path)
    assert [tuple(t.shape) for t in source.module(source.example).values()] == [(2, 64, 3), (2, 64, 4)]
    cut_at(source, *source.output_names, why="is left off: how much it returns depends on pixel values")
    opened = models.open(path)
    assert [spec.kind for spec in opened.network.outputs] == ["rows", "boxes"]
    assert any("is left off" in note for note in opened.notes)
    fused = fusion.fuse(opened.network).network
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert fusion.certify(opened.original, fused, [x]).max_relative < 1e-4
    answer = lrp.Explainer(fused, composite="auto").explain(x)
    assert answer.explained[0][0].reduce == "max"
    assert answer.explained[0][0].output == source.output_names[0]
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("ssdlite320_mobilenet_v3_large", [(2, 3234, 5), (2, 3234, 4)]),
        ("retinanet_resnet50_fpn", [(2, 3069, 5), (2, 3069, 4)]),
        ("fcos_resnet50_fpn", [(2, 341, 5), (2, 341, 1), (2, 341, 4)]),
    ],
)
def test_a_detector_of_torchvision(name: str, shapes: Sequence[tuple[int, ...]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=5)
    side = 320 if name.startswith("ssd") else 128
    whole.transform.min_size, whole.transform.max_size = (side,), side
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        whole.eval(), (torch.rand(1, 3, side, side),), path, dynamo=False, opset_version=17, input_names=["x"]
    )
    source = read(path)
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    want, got = source.original(x), source.module(x)
    assert [tuple(t.shape) for t in got.values()] == shapes
    for output in source.output_names:
        assert relative(got[output], want[output]) < 1e-4
    opened = models.open(path)
    answer = lrp.Explainer(fusion.fuse(opened.network).network, composite="auto").explain(x[:1])
    assert answer.explained[0][0].output == source.output_names[0]
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-3
