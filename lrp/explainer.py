"""The explainer: a network made ready once, explained many times, from any number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion import Fused, Network, Report, fuse
from fusion.errors import BadInput, BadTarget, UnbalancedLedger
from lrp.auto import AUTO, Choice, pick
from lrp.composites import DEFAULT, Composite, build
from lrp.goals import Goal, Question, classes_explained, goals, named, question, seeds_of
from lrp.grids import Grids
from lrp.heads import Head
from lrp.inner import (
    Channels,
    InnerLayer,
    InnerRelevance,
    choose_layers,
    directed,
    inner_layers,
    passing,
)
from lrp.ledger import Ledger, Recording
from lrp.rules import AnyRule
from lrp.sources import Source, open_source
from lrp.surrogate import Surrogate, build_surrogate
from lrp.targets import Explained, Neurons, Output, Seeds, Target, seeds_for

# How far a ledger may miss the score, as a share of all relevance moved, before it counts as unbalanced: some
# thousand roundings of the type.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Explanation:
    """Why the network answered as it did.

    relevance: [N, C, H, W], or [N, T, C, H, W] with several targets per image; its sum is what of the score arrived at
    the input. output: class scores [N, K] (before a final softmax or sigmoid), or the (first) output that is
    explained, in its own shape, or the values of the layer whose neurons are explained, flattened to [N, K]. target:
    class indices [N] or [N, T], None for anything else. score: what was explained, [N] or [N, T]. ledger: where the
    rest of the score is. seconds: the time the explanation took. inner: the relevance at the layers that were asked
    for. explained: what was explained, by image and target, in words too; empty for functions and neurons.
    """

    relevance: Tensor
    output: Tensor
    target: Tensor | None
    score: Tensor
    ledger: Ledger | None
    composite: str
    seconds: float
    inner: Mapping[str, InnerRelevance] = field(default_factory=dict)
    explained: tuple[tuple[Explained, ...], ...] = ()

    def heatmap(self) -> Tensor:
        """Relevance per pixel: summed over channels, [N, H, W] or [N, T, H, W]."""
        return self.relevance.sum(-3)

    def save(self, path: str | Path, *, index: int = 0, cmap: str = "bwr") -> Path:
        """Write the heatmap of one image (its first target) as a PNG and return the path."""
        from PIL import Image

        from lrp.heatmap import colorize

        heat = self.heatmap()[index]
        heat = heat if heat.ndim == 2 else heat[0]
        Image.fromarray(colorize(heat.float().cpu().numpy(), cmap=cmap)).save(path)
        return Path(path)


class Explainer:
    """A network ready to be explained.

    source: a Network, nn.Module, ExportedProgram, the path of a network file, or a zoo name ("builtin",
    "torchvision:NAME", "timm:NAME"). composite: a name, "auto" for what suits the network (`lrp.auto`; `notes` says
    why), or a Composite; `rules` overrides it by layer name or glob pattern. device: "auto" takes CUDA where there is
    one (`network`, the fused twin, stays on the CPU). strict: raise UnbalancedLedger where relevance is lost (needs the
    ledger). fold=False leaves every normalization in place, for comparisons: the composite's `batch_norm` says what
    becomes of relevance there. The user's network is never changed. Calls from several threads are independent.
    """

    @torch.inference_mode(False)  # tensors made under it cannot take part in a backward pass
    def __init__(
        self,
        source: Source,
        *,
        composite: str | Composite = DEFAULT,
        rules: Mapping[str, AnyRule] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        strict: bool = True,
        ledger: bool = True,
        example: Tensor | None = None,
        fold: bool = True,
    ) -> None:
        opened = open_source(source, example)
        self.source = opened
        self.device = resolve_device(device)
        self.dtype = dtype
        self.strict = strict
        self.with_ledger = ledger
        named = build(composite) if isinstance(composite, str) and composite != AUTO else composite
        # Made ready on the CPU, so that every device gets the same numbers; only the surrogate travels. Folded in
        # float32 at least: parameters that are rounded before they are multiplied would be rounded twice.
        network = opened.network.to(device="cpu", dtype=torch.promote_types(dtype, torch.float32))
        fused = fuse(network) if fold else Fused(network, Report(()))
        self.network: Network = fused.network.to(dtype=dtype)
        self.report = fused.report
        choice = pick(self.network) if isinstance(named, str) else Choice(named)
        self.composite = choice.composite.override(rules) if rules else choice.composite
        self.reason = choice.reason  # why "auto" picked this composite; empty where a user did
        surrogate = build_surrogate(self.network, self.composite)
        self._surrogate: Surrogate = surrogate if self.device.type == "cpu" else surrogate.to(self.device)

    @property
    def tolerance(self) -> float:
        """How far a ledger may miss the score, as a share of all relevance moved, in this explainer's type."""
        return _TOLERANCE[self.dtype]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about how the network was read."""
        return (*self.source.notes, *self._surrogate.notes, *([self.reason] if self.reason else []))

    def table(self) -> list[tuple[str, str, str]]:
        """(layer, operator, rule) for every linear layer, in execution order."""
        return [(layer.name, layer.node.name, str(rule)) for layer, rule in self._surrogate.rules]

    def __str__(self) -> str:
        width = max((len(layer) for layer, _, _ in self.table()), default=0)
        rows = [f"{layer:{width}}  {rule}" for layer, _, rule in self.table()]
        return "\n".join([self.composite.name, *rows])

    def prepare(self, image: Any) -> Tensor:
        """An image as the network's input [N, C, H, W]: a tensor passes as it is (a batch axis is added), anything
        else goes through the preprocessing that came with the network."""
        if not isinstance(image, Tensor):
            if self.source.prepare is None:
                raise BadInput(
                    "This network came without preprocessing, so its input must be a tensor "
                    f"{['N', *self.network.inputs[0].shape[1:]]} that is already scaled and normalized."
                )
            image = self.source.prepare(image)
        expected = self.network.inputs[0].shape
        if image.ndim == len(expected) - 1:
            image = image[None]
        fits = image.ndim == len(expected) and all(
            e is None or e == s for e, s in zip(expected, image.shape, strict=True)
        )
        if not fits or image.shape[0] == 0:
            raise BadInput(
                f"The network takes {['N', *expected[1:]]}; the input has shape {list(image.shape)}."
            )
        x: Tensor = image.detach().to(device=self.device, dtype=self.dtype)
        if not bool(torch.isfinite(x).all()):
            raise BadInput("The input contains NaN or infinity. Give finite pixel values.")
        return x

    @property
    def heads(self) -> tuple[Head, ...]:
        """The outputs that can be explained."""
        return self._surrogate.heads

    def predict(self, image: Any) -> Tensor:
        """Class scores [N, K], before a final softmax or sigmoid; of a network without any, its default output."""
        return self._answers(self._surrogate.program, self.prepare(image))[0]

    def outputs(self, image: Any) -> dict[str, Tensor]:
        """All outputs by name, each as it is explained: [N, ...], before a final softmax or sigmoid."""
        answers = self._answers(self._surrogate.whole, self.prepare(image))
        return {head.name: answer for head, answer in zip(self.heads, answers, strict=True)}

    def _answers(self, program: Callable[..., Any], x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            answers = program(x, torch.ones_like(x), None)
        return tuple(self._finite(t) for t in _several(answers))

    def explain(
        self,
        image: Any,
        target: Target = None,
        *,
        at: str | Sequence[str] = (),
        through: Mapping[str, Channels] | None = None,
    ) -> Explanation:
        """The relevance of every input value for the target: of classes (`lrp.targets.seeds_for` has the forms), of an
        `lrp.Output`, or a list of these, which cost one forward together. By default the class with the highest score;
        without class scores, what `lrp.goals.default_output` says of the first output, and `explained` in the answer.

        at: layers whose relevance is wanted too. through: only the relevance that passes these channels of these layers
        (indices, or a mask) goes on to the input; the ledger has the rest (concept relevance propagation, Achtibat et
        al. 2023, arXiv:2206.03208), and what goes past a layer, as along a skip connection, is not touched. Layers go
        by the names of `inner_layers()`. Raises BadLayer for one that is not there, BadInput where the input or the
        network's answer to it is not finite, and UnbalancedLedger, if strict, where relevance is not finite or missing.

        A class with a negative score hands out negative relevance. One with a score of exactly 0 hands out none (under
        LRP-0, what speaks for it and what speaks against it, which cancel). An input of zeros gets none from rules that
        multiply by the input, all but flat, w^2 and zB: the biases keep it.
        """
        started = time.perf_counter()
        x = self.prepare(image)
        asked, heads = self._asked(target)
        program, watched, masks = self._instruments(len(x), target, heads, at, through or {})
        recording = Recording(len(x), masks) if self.with_ledger or watched else None
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            x = x.clone() if x.is_inference() else x
            gate = torch.ones_like(x, requires_grad=True)
            answers = [self._finite(answer) for answer in _several(program(x, gate, recording))]
            values = [answer.detach() for answer in answers]
            found = goals(asked, heads, values, tuple(x.shape[2:])) if asked else []
            seeds = seeds_of(found, values, asked.several) if asked else self._seeds(target, values[0])
            maps = []
            for i, (answer, seed) in enumerate(zip(seeds.of(answers), seeds.seeds, strict=True)):
                if recording is not None:
                    recording.next_target()
                last = i == len(seeds.seeds) - 1
                (relevance,) = torch.autograd.grad(answer, gate, seed, retain_graph=not last)
                maps.append(relevance)
        explained = seeds.totals(values)
        relevance = torch.stack(maps, 1) if seeds.several else maps[0]
        score = explained if seeds.several else explained[:, 0]
        ledger = None
        if recording is not None and self.with_ledger:
            arrived = relevance.flatten(2 if seeds.several else 1).sum(-1, dtype=torch.float64)
            ledger = recording.ledger(score, arrived, self._surrogate.layers, seeds.several)
        if self.strict:
            self._balanced(relevance, ledger)
        inner = {
            layer.name: layer.relevance(recording.watched(layer.node), x, seeds.several)
            for layer in watched
            if recording is not None
        }
        seconds = time.perf_counter() - started
        words = self._words(target, found, seeds)
        return Explanation(
            relevance, values[0], seeds.classes, score, ledger, self.composite.name, seconds, inner, words
        )

    def attribute(
        self,
        image: Any,
        target: Target = None,
        method: str = "IntegratedGradients",
        *,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Explanation:
        """Another attribution of the same network, for comparison, through captum: `lrp.attributions.METHODS` has the
        methods, each with its options and its paper. There is no ledger, and `composite` is the method's name.
        progress: told before every run of the network, of how many images; what it raises ends the attribution.

        Raises BadComposite for a method or an option that is not there, BadInput and BadLayer where the network does
        not fit the method.
        """
        from lrp import attributions

        started = time.perf_counter()
        x = self.prepare(image)
        asked, heads = self._asked(target)
        layer = self._chosen(target.layer)[target.layer] if isinstance(target, Neurons) else None
        function = target if callable(target) and not isinstance(target, Tensor) else None
        network = self._plain
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            x = x.clone().requires_grad_()
            with torch.no_grad():
                values = [
                    self._finite(attributions.scored(network, layer, name=head.name).scores(x))
                    for head in heads
                ]
            found = goals(asked, heads, values, tuple(x.shape[2:])) if asked else []
            seeds = seeds_of(found, values, asked.several) if asked else self._seeds(target, values[0])
            maps = []
            for i, seed in enumerate(seeds.seeds):
                goal = found[i] if found else None
                reduce = None if function is None else _of_scores(function)
                # Methods rewrite the graph that they are given.
                scored = attributions.scored(
                    network,
                    layer,
                    reduce if goal is None else goal.value,
                    progress,
                    heads[0 if goal is None else goal.answer].name,
                )
                weights = seed if goal is None else goal.weights
                subject = attributions.Subject(network, self._grids, scored, x, weights)
                maps.append(attributions.attribute(method, subject, options))
        explained = seeds.totals(values)
        if function is not None:
            explained = function(values[0])[:, None].detach()
        relevance = torch.stack(maps, 1) if seeds.several else maps[0]
        score = explained if seeds.several else explained[:, 0]
        seconds = time.perf_counter() - started
        words = self._words(target, found, seeds)
        return Explanation(relevance, values[0], seeds.classes, score, None, method, seconds, explained=words)

    def _finite(self, answer: Tensor) -> Tensor:
        """The network's answer itself. Raises BadInput where it is no finite number."""
        wrong = (~answer.isfinite().flatten(1).all(1)).nonzero()
        if len(wrong):
            raise BadInput(
                f"The network's answer to input {int(wrong[0])} is not finite: its values leave the range of "
                f"{self._type} on the way. Give values like those it was trained on{self._wider}."
            )
        return answer

    def _balanced(self, relevance: Tensor, ledger: Ledger | None) -> None:
        """Raises UnbalancedLedger where relevance is no finite number, or missing."""
        if not bool(relevance.isfinite().all()) or not (ledger is None or ledger.finite):
            raise UnbalancedLedger(
                f"The relevance is not finite: it leaves the range of {self._type}. Take another composite or smaller "
                f"parameters, or values like those that the network was trained on{self._wider}."
            )
        if ledger is not None and not ledger.closes(self.tolerance):
            raise UnbalancedLedger(
                f"Relevance is missing: the ledger is off by {float(ledger.error.max()):.2g} of the score. "
                "Explain in float64, or with strict=False to get the map all the same."
            )

    @property
    def _type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def _wider(self) -> str:
        return "" if self.dtype == torch.float64 else ", or explain in float64"

    @cached_property
    def cam_layer(self) -> str:
        """The layer whose maps `attribute(method="GradCAM")` weighs for class scores. Raises BadLayer where there is
        none."""
        from lrp import attributions

        shape = [1 if size is None else size for size in self.network.inputs[0].shape]
        x = torch.zeros(shape, dtype=self.dtype, device=self.device)
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            scored = attributions.scored(self._plain)
            return attributions.cam_layer(self._plain, self._grids, scored, x, None).name

    @cached_property
    def _grids(self) -> Grids:
        return Grids(self.network)

    @cached_property
    def _plain(self) -> Network:
        """The fused network where the explanations are computed."""
        return self.network if self.device.type == "cpu" else self.network.to(device=self.device)

    def inner_layers(self) -> list[InnerLayer]:
        """Every layer whose relevance can be asked for, in execution order."""
        return list(self._inner_layers.values())

    @cached_property
    def _inner_layers(self) -> dict[str, InnerLayer]:
        return inner_layers(self.network, self._surrogate, self._grids)

    def _chosen(self, *names: str) -> dict[str, InnerLayer]:
        return choose_layers(self.network, self._inner_layers, names)

    def _instruments(
        self,
        samples: int,
        target: Target,
        heads: Sequence[Head],
        at: str | Sequence[str],
        through: Mapping[str, Channels],
    ) -> tuple[Callable[..., Any], list[InnerLayer], dict[str, Tensor]]:
        """The program that answers this question, the layers that it watches, and the masks at them."""
        names = [at] if isinstance(at, str) else list(at)
        neurons = target.layer if isinstance(target, Neurons) else None
        if not (names or through or neurons is not None):
            alone = tuple(heads) == (self._surrogate.default,)
            return self._surrogate.program if alone else directed(self._surrogate, (), heads=heads), [], {}
        also = () if neurons is None else (neurons,)
        found = self._chosen(*names, *through, *also)
        masks: dict[str, Tensor] = {}
        for name, channels in through.items():
            mask = found[name].mask(channels, samples).to(device=self.device, dtype=self.dtype)
            node = found[name].node  # of two names of one node both count
            masks[node] = masks[node] * mask if node in masks else mask
        watched = [found[name] for name in dict.fromkeys((*names, *through))]
        program = directed(self._surrogate, watched, None if neurons is None else found[neurons], heads)
        return program, watched, masks

    def _asked(self, target: Target) -> tuple[Question | None, tuple[Head, ...]]:
        """The target in terms of outputs (None: of classes, or neurons), and the outputs that it reads. Raises
        BadTarget."""
        asked = question(target, self.heads)
        if asked is None:
            return None, (self._surrogate.default,)
        heads = tuple(dict.fromkeys(named(self.heads, output.name) for output in asked.outputs))
        closed = next((head for head in heads if head not in self._open), None)
        if closed is not None:
            raise BadTarget(
                f"No relevance passes from the output {closed} to the image: it does not depend on it, or only by what "
                "chooses or scales a signal. Take another output."
            )
        outputs = tuple(
            replace(output, name=named(self.heads, output.name).name, like=self._like(output))
            for output in asked.outputs
        )
        return replace(asked, outputs=outputs), heads

    @cached_property
    def _open(self) -> tuple[Head, ...]:
        """The outputs from which relevance reaches the image."""
        graph = self._surrogate.whole.graph
        reached = passing(graph)
        (values,) = graph.output_node().args
        return tuple(
            head for head, node in zip(self.heads, _several(values), strict=True) if node.name in reached
        )

    def _like(self, output: Output) -> Any:
        """What an output is compared with: the values themselves, or those of an image."""
        like, shape = output.like, self.network.inputs[0].shape
        if like is None or not _is_image(like, shape):
            return like
        head = named(self.heads, output.name)
        return self._answers(directed(self._surrogate, (), heads=[head]), self.prepare(like))[0]

    def _words(
        self, target: Target, found: Sequence[Goal], seeds: Seeds
    ) -> tuple[tuple[Explained, ...], ...]:
        """What was explained, by image and target."""
        if found:
            return tuple(zip(*(goal.explained for goal in found), strict=True))
        if seeds.classes is None:
            return ()
        return classes_explained(target, self._surrogate.default, seeds.classes)

    def _seeds(self, target: Target, scores: Tensor) -> Seeds:
        if not isinstance(target, Neurons):
            return seeds_for(target, scores)
        layer = self._chosen(target.layer)[target.layer]
        if target.channels is None:
            return Seeds((torch.ones_like(scores),), None, False)
        mask = layer.mask(target.channels, len(scores)).to(device=scores.device, dtype=scores.dtype)
        seed = layer.by_sample(mask.expand(layer.size(len(scores)))).flatten(1)
        return Seeds((seed,), None, False)


def _several(answers: Any) -> tuple[Any, ...]:
    """The answers of a program, which are no tuple where it is one."""
    return answers if isinstance(answers, tuple) else (answers,)


def _of_scores(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, weights: function(scores)


def _is_image(like: Any, shape: Sequence[int | None]) -> bool:
    """Whether this is an image rather than the values of an output: anything but numbers, or a tensor of the input's
    shape."""
    if isinstance(like, Tensor):
        return like.ndim in (len(shape), len(shape) - 1) and tuple(like.shape[-3:]) == tuple(shape[-3:])
    return not isinstance(like, list | tuple)


def explain(
    network: Source,
    image: Any,
    target: Target = None,
    *,
    composite: str | Composite = DEFAULT,
    rules: Mapping[str, AnyRule] | None = None,
    at: str | Sequence[str] = (),
    through: Mapping[str, Channels] | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain one call in one line; keep an `Explainer` for many."""
    example = image if isinstance(image, Tensor) and image.ndim == 4 else None
    explainer = Explainer(
        network, composite=composite, rules=rules, device=device, dtype=dtype, example=example
    )
    return explainer.explain(image, target, at=at, through=through)


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one and the CPU otherwise."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
