"""Every error that a user of Clearfold may see: each says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class ClearfoldError(Exception):
    """Base of all errors raised on purpose; `code` is stable and names the problem for machines."""

    code = "clearfold-error"


class BadFile(ClearfoldError):
    """A file that is unreadable, truncated, or not what its name says."""

    code = "bad-file"


class MissingData(BadFile):
    """A file whose weights are in other files that are not there."""

    code = "missing-data"


class UnsafeFile(ClearfoldError):
    """A file that could do more than describe a network; nothing of it was run."""

    code = "unsafe-file"

    def __init__(self, found: str, why: str) -> None:
        super().__init__(f"{found}, so it is not opened. {why} If the file is yours, export it as ONNX.")


class CaptureError(ClearfoldError):
    """A network that could not be captured as one graph."""

    code = "capture-failed"


class UnsupportedOperator(ClearfoldError):
    """An operator that nothing here can run or explain; names the operator and the layer it stands in."""

    code = "unsupported-operator"

    def __init__(self, op: str, layer: str, hint: str = "") -> None:
        self.op = op
        self.layer = layer
        advice = hint or "Replace that layer by supported operators and export the network again."
        super().__init__(f"Operator {op} in layer '{layer or '(top level)'}' is not supported. {advice}")


class NoClassScores(ClearfoldError):
    """A question about classes to a network without a table of class scores [batch, classes]."""

    code = "no-class-scores"


class NothingToExplain(ClearfoldError):
    """A network none of whose outputs holds floating-point numbers for each image of a batch."""

    code = "nothing-to-explain"


class NonFiniteWeights(ClearfoldError):
    """Weights that contain NaN or infinity."""

    code = "non-finite-weights"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        shown = ", ".join(self.names[:5]) + (
            f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        )
        super().__init__(
            f"The weights {shown} contain NaN or infinity, so nothing the network says can be explained. "
            "Export the network again from a checkpoint with finite weights."
        )


class BadInput(ClearfoldError):
    """An image or tensor that the network cannot take."""

    code = "bad-input"


class BadTarget(ClearfoldError):
    """A target that the network's output does not have."""

    code = "bad-target"


class BadLayer(ClearfoldError):
    """A layer that the network does not have, or channels that the layer does not have."""

    code = "bad-layer"


class BadComposite(ClearfoldError):
    """An unknown composite, a parameter it does not take, or a rule override that matches no layer."""

    code = "bad-composite"


class ArtefactError(ClearfoldError):
    """A stored network that is damaged, foreign or of another version."""

    code = "bad-artefact"


class UnbalancedLedger(ClearfoldError):
    """Relevance that is neither at the input nor accounted for by a layer."""

    code = "unbalanced-ledger"
