"""A network without class scores on the page: its outputs are listed, and each can be explained."""

import json
import urllib.request
from pathlib import Path
from urllib.parse import quote

import torch
from page_visit import Visit
from torch import Tensor, nn

from tests.support.served import save_onnx


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.head, self.norm = nn.Conv2d(6, 4, 1), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        return self.head(y), self.norm(y.mean((2, 3)))


def test_the_outputs_are_offered_and_explained(visit: Visit, tmp_path: Path) -> None:
    file = save_onnx(Segmenter().eval(), tmp_path / "segmenter.onnx")
    request = urllib.request.Request(
        f"{visit.address}/v1/models?filename=segmenter.onnx&name=segmenter",
        file.read_bytes(),
        {"Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        model = json.load(answer)
    map_, embedding = (output["name"] for output in model["outputs"])
    visit.open(f"#model={model['id'][:16]}")
    assert "2 outputs" in visit.page.locator(".network", has_text="segmenter").inner_text()
    visit.take_sample()
    assert "where it wins" in visit.title()
    rows = visit.page.locator("#classes button")
    assert [row.split()[0] for row in rows.all_inner_texts()] == [map_, embedding]
    assert rows.nth(0).get_attribute("aria-pressed") == "true"
    assert "The books close" in visit.page.locator("#account").inner_text()
    visit.explain(1)
    assert visit.title().startswith(f"the norm of '{embedding}'")
    assert rows.nth(1).get_attribute("aria-pressed") == "true"
    assert "The books close" in visit.page.locator("#account").inner_text()
    assert (
        f"target={quote(json.dumps({'output': embedding}, separators=(',', ':')), safe='')}" in visit.page.url
    )
    visit.page.screenshot(path=str(tmp_path / "outputs.png"))
