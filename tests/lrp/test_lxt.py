"""CP-LRP and AttnLRP on torchvision's ViT-B/16 against their authors' LXT 2.1 (its efficient rules), in float64.

LXT's declared dependencies hold Hugging Face's and GPU-only packages that none of this needs, so it is no test extra:
`pip install --no-deps lxt==2.1` makes these tests run, and they skip without it. `tests.support.by_lxt` says what is
LXT's own and what is put around it.

The conventions agree: linear layers by LRP-0, 1/deviation and attention weights constant (CP-LRP) or half of the
gradient to values and a quarter to queries and keys (AttnLRP), f(x)/x at activations; biases, position embeddings and
the class token keep their part. Three differ, and are brought together here:
- Epsilon. LXT's linear layers have none; the composite's default is 1e-6, here 0. LXT's GELU divides by x + 1e-10
  (see `by_lxt.patch_gelu`). Beside zennit's gamma rule LXT divides relevance by x +- 1e-10; this stays as it is, and is
  why those maps differ by 2e-7.
- Which layers gamma reaches: in LXT not the projections of attention, which no hook of zennit's sees.
- Which weights gamma sees: LXT's are the network's own. Folding the layer norms' weights into the layers behind them
  moves the gamma rule's map (not LRP-0's), so that comparison is made with fold=False.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fusion
import lrp
from lrp.composites import Composite
from tests.support import by_lxt

ROOT = Path(__file__).resolve().parents[2]
Answers: TypeAlias = Callable[[str], dict[str, Tensor]]


def lxt_is_there() -> bool:
    try:
        return version("lxt") == "2.1"
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not lxt_is_there(), reason="needs LXT: pip install --no-deps lxt==2.1")

ATTNLRP = lrp.build("AttnLRP", epsilon=0.0, stabilizer=0.0)
CP_LRP = replace(ATTNLRP, name="CP-LRP", attention="values")
GAMMA = Composite(
    "CP-LRP gamma",
    convolution=lrp.Gamma(by_lxt.GAMMA_CONVOLUTION),
    linear=lrp.Gamma(by_lxt.GAMMA_LINEAR),
    overrides=(("*.self_attention", lrp.LRP0()),),
)


@pytest.fixture(scope="module")
def captured() -> fusion.Network:
    return fusion.capture(by_lxt.vit(), (by_lxt.image(),))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """LXT's scores and relevance, one process for each way."""

    @cache
    def run(way: str) -> dict[str, Tensor]:
        path = tmp_path_factory.mktemp("lxt") / "answer.safetensors"
        command = [sys.executable, "-m", "tests.support.by_lxt", way, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return load_file(path)

    return run


@pytest.mark.parametrize(
    ("composite", "fold", "tolerance"),
    [
        (CP_LRP, True, 1e-12),
        (ATTNLRP, True, 1e-12),
        pytest.param(GAMMA, False, 1e-6, marks=pytest.mark.slow),
    ],
    ids=[CP_LRP.name, ATTNLRP.name, GAMMA.name],
)
def test_the_same_relevance_as_lxt(
    captured: fusion.Network, expected: Answers, composite: Composite, fold: bool, tolerance: float
) -> None:
    theirs = expected(composite.name)
    explainer = lrp.Explainer(captured, composite=composite, dtype=torch.float64, fold=fold)
    answer = explainer.explain(by_lxt.image(), by_lxt.TARGET)
    torch.testing.assert_close(answer.output, theirs["scores"], rtol=0, atol=1e-12)
    difference = float((answer.relevance - theirs["relevance"]).abs().max())
    assert difference <= tolerance * float(theirs["relevance"].abs().max())
