"""What is done with an image in a worker thread: run the network, explain it, describe what came out."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import lrp
from app import composites, methods, targets
from app.inside import Inner, described
from app.methods import Limits
from app.subject import Subject
from app.targets import OTHERS
from fusion.errors import BadComposite, BadTarget, ClearfoldError, NoClassScores, UnbalancedLedger
from fusion.outputs import default_of
from lrp.targets import Target
from models.preprocess import InputSpec, decode, displayed, prepare

Pixels = NDArray[np.uint8]
Relevance = NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """What to explain, and how; `target` is the index or the label of a class, or JSON (`app.targets`).

    method: LRP, by the composite, or one of `app.methods`. parameters: the composite's, or the method's options.
    against: the class to compare it with, or "others". layer: where relevance is looked at too, with its `top`
    channels. through: the channels of layers that relevance has to pass. mask, reference: images that go with the
    target.
    """

    image: bytes
    target: str | None = None
    composite: str = composites.DEFAULT
    parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str = methods.DEFAULT
    against: str | None = None
    layer: str | None = None
    top: int = 10
    through: Mapping[str, Sequence[int]] = field(default_factory=dict)
    mask: bytes | None = None
    reference: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """The relevance [C, H, W] (GradCAM: [1, H, W]), the image as the network saw it [H, W, 3], everything in words, and
    the relevance at the layer that was asked for."""

    relevance: Relevance
    image: Pixels
    summary: dict[str, Any]
    inner: Inner | None = None


class TookTooLong(ClearfoldError):
    """An explanation that would have kept the machine busy for longer than one may."""

    code = "explanation-timeout"


def explain(load: Callable[[], Subject], question: Question, limits: Limits = methods.PATIENT) -> Answer:
    """Raises BadInput, BadTarget, BadLayer, BadComposite, UnbalancedLedger, TookTooLong, and whatever `load` raises."""
    clock = Clock()
    with clock("load"):
        subject = load()
        target = targets.read(question.target, subject, question.mask, question.reference)
        against = None if question.against is None else targets.compared(question.against, subject)
    with clock("prepare"):
        picture = decode(question.image)
        x = prepare(picture, subject.input)
        seen = displayed(picture, subject.input)
    with clock("explain"):
        goal = target if question.against is None else _contrast(target, against)
        way = _by_lrp if question.method == methods.LRP else _by_comparison
        explanation, words, inner = way(subject, x, goal, question, limits)
        relevance = explanation.relevance[0].detach().float().cpu().numpy()
    summary = {
        "model": subject.id,
        "method": question.method,
        "prediction": _prediction(explanation, subject),
        "target": _described(explanation, subject),
        "sum": float(relevance.sum(dtype=np.float64)),
        **words,
        "timings": clock.milliseconds,
        "shape": list(relevance.shape),
    }
    if question.against is not None:
        compared = None if against is None else {"index": against, "label": subject.label(against)}
        summary["against"] = OTHERS if compared is None else compared
    return Answer(np.ascontiguousarray(relevance), seen, summary, inner)


def _contrast(target: Target, against: int | None) -> lrp.Contrast:
    if not isinstance(target, int | None):
        raise BadTarget("Only classes can be compared with classes: leave `against` out, or name a class.")
    return lrp.Contrast(target, against)


def _prediction(explanation: lrp.Explanation, subject: Subject) -> dict[str, Any] | None:
    """The best class, None where there are no scores or something else was explained."""
    scores = explanation.output[0].detach().double().cpu()
    return best(scores, subject, 1)[0] if explanation.explained[0][0].kind == "scores" else None


def _described(explanation: lrp.Explanation, subject: Subject) -> dict[str, Any]:
    """What was explained of the (only) image."""
    what = explanation.explained[0][0]
    index = what.index[0] if what.kind == "scores" and what.index is not None else None
    named = index if index is not None else what.channel
    return {
        "index": index,
        "label": None if named is None else subject.label(named),
        "score": float(explanation.score[0]),
        "output": what.output,
        "channel": what.channel,
        "position": None if what.index is None else list(what.index),
        "places": what.places,
        "explained": what.text,
    }


_Way = tuple[lrp.Explanation, dict[str, Any], Inner | None]


def _by_lrp(subject: Subject, x: torch.Tensor, goal: Target, question: Question, limits: Limits) -> _Way:
    """One backward pass, with the books."""
    at = () if question.layer is None else (question.layer,)
    explanation = subject.explainer.explain(x, goal, at=at, through=question.through)
    ledger = explanation.ledger
    assert ledger is not None  # an explainer keeps one unless told not to
    refuse_non_finite(ledger)
    warnings = imbalance(ledger, subject.explainer.tolerance)
    words: dict[str, Any] = {
        "composite": question.composite,
        "picked": explanation.composite,
        "parameters": {**composites.parameters(question.composite), **question.parameters},
        "balanced": not warnings,
        "warnings": warnings,
        "sums": ledger.summary(),
        "ledger": ledger.to_json(),
    }
    if question.composite == composites.AUTO:
        words["reason"] = subject.explainer.reason
    if question.through:
        words["through"] = {layer: list(channels) for layer, channels in question.through.items()}
    inner = None
    if question.layer is not None:
        inner, words["inner"] = described(explanation.inner[question.layer], question.top)
    return explanation, words, inner


def _by_comparison(
    subject: Subject, x: torch.Tensor, goal: Target, question: Question, limits: Limits
) -> _Way:
    """Another method: as many runs as it takes, and no books."""
    options = methods.fitted(question.method, question.parameters, subject.explainer, limits)
    explanation = subject.explainer.attribute(
        x, goal, question.method, progress=_until(limits.seconds), **options
    )
    if not bool(explanation.relevance.isfinite().all()):
        raise BadComposite(
            f"The map by {question.method} is not finite: with these options it leaves the range of float32. Take "
            "options nearer to the image's values, or another method."
        )
    missing = dict.fromkeys(("composite", "picked", "balanced", "sums", "ledger"))
    return explanation, {**missing, "parameters": options, "warnings": []}, None


def _until(seconds: float | None) -> Callable[[int], None] | None:
    """Raises TookTooLong when it is called later than that from now."""
    if seconds is None:
        return None
    end = time.monotonic() + seconds

    def check(images: int) -> None:
        if time.monotonic() > end:
            raise TookTooLong(
                f"The explanation was given up after {seconds:g} seconds. Ask for less (fewer steps or samples, a "
                "larger stride), or for LRP, which runs the network once."
            )

    return check


def imbalance(ledger: lrp.Ledger, tolerance: float) -> list[str]:
    """What to tell whoever reads a map of one image: nothing where the ledger balances, or how much is nowhere."""
    if ledger.closes(tolerance):
        return []
    score, found = float(ledger.score), float(ledger.input + ledger.kept)
    return [
        f"The relevance does not add up: {abs(score - found):.3g} is missing between the score {score:.4g} and the "
        f"{found:.4g} that was found, so do not trust the map. Take another composite or other parameters, or explain "
        "in float64 with the Python library: lrp.Explainer(..., dtype=torch.float64)."
    ]


def refuse_non_finite(ledger: lrp.Ledger) -> None:
    """A map with NaN or infinity in it cannot be drawn or written as JSON. Raises UnbalancedLedger."""
    if not ledger.finite:
        raise UnbalancedLedger(
            "The relevance is not finite: with these parameters it leaves the range of float32. Take another composite "
            "or smaller parameters, or explain in float64 with the Python library."
        )


def predict(subject: Subject, image: bytes, top: int) -> dict[str, Any]:
    """The `top` classes. Raises BadInput, and NoClassScores where there are none."""
    if subject.classes is None:
        outputs = ", ".join(map(str, subject.explainer.heads))
        raise NoClassScores(
            f"The network predicts no classes, but {outputs}: ask for an explanation of one of these."
        )
    scores = subject.explainer.predict(prepare(decode(image), subject.input))[0]
    return {"model": subject.id, "predictions": best(scores.detach().double().cpu(), subject, top)}


def preview(spec: InputSpec, image: bytes) -> Pixels:
    """What the network sees of the image. Raises BadInput."""
    return displayed(decode(image), spec)


def best(scores: torch.Tensor, subject: Subject, top: int) -> list[dict[str, Any]]:
    """The `top` classes by score, best first; `scores` is [K]. Classes that a sigmoid decides one by one do not share
    their probability."""
    each = default_of(subject.explainer.heads).before in ("sigmoid", "log_sigmoid")
    probabilities = scores.sigmoid() if each else scores.softmax(dim=0)
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [
        {
            "index": index,
            "label": subject.label(index),
            "probability": float(probabilities[index]),
            "score": float(scores[index]),
        }
        for index in order
    ]


class Clock:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[stage] = round((time.perf_counter() - start) * 1000, 3)
