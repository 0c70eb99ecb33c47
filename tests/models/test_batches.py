"""Files for one number of images, in all forms, answer and explain for any; runtimes are asked in portions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
import models
from fusion.errors import BadInput
from models.convert import NotEquivalent, check_apart
from models.formats.portions import any_number, in_portions
from tests.models.nets import small

SIZE = 16


class Counting(nn.Module):
    """It takes the number of its images as a number, as `len(x)` is to a tracer; a class token stands beside each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).reshape(len(x), 8, -1).transpose(1, 2)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1)
        return self.head((y + self.attention(y, y, y)[0])[:, 0])  # type: ignore[no-any-return]


def written(form: str, batch: int, folder: Path) -> Path:
    module, x = Counting().eval(), torch.randn(batch, 3, SIZE, SIZE)
    path = folder / ("net.onnx" if form == "onnx" else "net.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "traced":
            torch.jit.trace(module, x, check_trace=False).save(str(path))  # type: ignore[no-untyped-call]
        elif form == "exported":
            torch.export.save(torch.export.export(module, (x,)), path)
        else:
            torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    return path


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("form", ["traced", "exported", "onnx"])
def test_a_file_for_one_number_of_images(form: str, batch: int, tmp_path: Path) -> None:
    opened = models.open(written(form, batch, tmp_path), size=(SIZE, SIZE))
    module = Counting().eval()
    x = torch.randn(5, 3, SIZE, SIZE)
    with torch.no_grad():
        want = module(x)
    torch.testing.assert_close(opened.original(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(opened.network(x), want, rtol=1e-4, atol=1e-5)
    answer = lrp.Explainer(fusion.fuse(opened.network).network, composite="auto").explain(x)
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-5


class Answers(nn.Module):
    """Everything that a network can return, of which one belongs to no image; the image comes by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, pixels: Tensor, *, flag: bool | None = None) -> dict[str, Any]:
        y = self.network(pixels)
        return {"logits": y, "loss": y.mean(), "others": (y.exp(), y.sum(1))}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_that_takes_its_image_by_keyword(batch: int, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    module = Answers().eval()
    program = torch.export.export(module, (), {"pixels": torch.randn(batch, 3, SIZE, SIZE), "flag": None})
    torch.export.save(program, path)
    opened = models.open(path)
    assert [spec.name for spec in opened.network.outputs] == ["logits", "others.0", "others.1"]
    x = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        answers = module(x)
    for got in (opened.network(x), opened.original(x)):
        torch.testing.assert_close(list(got), [answers["logits"], *answers["others"]], rtol=1e-4, atol=1e-5)


def test_portions_are_filled_up_and_put_together() -> None:
    seen = []

    def run(x: Tensor) -> Any:
        seen.append(len(x))
        return {"rows": x * 2, "of no image": torch.tensor(7.0), "word": "x", "pair": (x.sum(1), None)}

    x = torch.arange(10.0).reshape(5, 2)
    answers = in_portions(run, 2)(x)
    assert seen == [2, 2, 2]
    torch.testing.assert_close(answers["rows"], x * 2)
    torch.testing.assert_close(answers["pair"][0], x.sum(1))
    assert (float(answers["of no image"]), answers["word"], answers["pair"][1]) == (7.0, "x", None)


def test_a_runtime_of_one_image_that_drops_its_axis() -> None:
    x = torch.randn(4, 3, 2)
    torch.testing.assert_close(in_portions(lambda part: part.mean(2).squeeze(), 1)(x), x.mean(2))


def test_a_runtime_that_takes_any_number_is_asked_once() -> None:
    seen: list[int] = []

    def run(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x + 1

    x = torch.zeros(5, 2)
    torch.testing.assert_close(any_number(run, 2)(x), x + 1)
    assert seen == [5]


@pytest.mark.parametrize("answers_two", [False, True])
def test_a_runtime_that_takes_one_number_only(answers_two: bool) -> None:
    def run(x: Tensor) -> Tensor:
        if len(x) != 2 and not answers_two:
            raise RuntimeError("shape '[2, -1]' is invalid")
        return x.reshape(2, -1, 3).sum(1)

    x = torch.randn(5, 1, 3)
    torch.testing.assert_close(any_number(run, 2)(x), x[:, 0])


def test_what_is_wrong_with_the_image_is_said_as_it_is() -> None:
    def run(x: Tensor) -> Tensor:
        raise BadInput("too small")

    with pytest.raises(BadInput, match="too small"):
        any_number(run, 2)(torch.zeros(3, 1))


def test_a_network_that_mixes_its_images_is_not_stored() -> None:
    class Mixing(nn.Module):
        """Batch statistics, as a network has them that was exported while it was trained."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.mean((2, 3))
            return y, y - y.mean(0, keepdim=True)

    x = torch.randn(2, 3, SIZE, SIZE)
    check_apart(fusion.capture(small(), (x,)), x.split(1))
    with pytest.raises(NotEquivalent, match="images beside it"):
        check_apart(fusion.capture(Mixing(), (x,)), x.split(1))
