"""The shapes of the API's answers, for the OpenAPI document and for whoever writes a client."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from fusion.outputs import default_of


class ProblemDocument(BaseModel):
    """RFC 9457. `type` ends with a code that does not change; `detail` says what to do."""

    type: str = Field(examples=["/problems/model-not-found"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's id, as in X-Request-ID and in the server's log")
    errors: list[dict[str, Any]] | None = Field(None, description="One entry per wrong parameter")


class InputDescription(BaseModel):
    """How an image becomes the network's input."""

    size: tuple[int, int] = Field(description="Height and width", examples=[[224, 224]])
    channels: int = 3
    mean: list[float] = Field(description="Subtracted per channel, after scaling")
    std: list[float] = Field(description="Divided by per channel, after that")
    scale: float = Field(description="Factor on pixels 0..255")
    order: Literal["RGB", "BGR", "L"] = "RGB"
    resize: Literal["squash", "crop"] = Field("squash", description="What to do with another aspect ratio")
    crop_fraction: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"


class InputChange(BaseModel):
    """Fields of the input description to change; the size belongs to the network and cannot be changed."""

    model_config = ConfigDict(extra="forbid")

    size: tuple[int, int] | None = Field(None, description="May be sent back, but must be the present one")
    channels: int | None = Field(None, description="May be sent back, but must be the present one")
    mean: list[float] | None = None
    std: list[float] | None = None
    scale: float | None = Field(None, gt=0)
    order: Literal["RGB", "BGR", "L"] | None = None
    resize: Literal["squash", "crop"] | None = None
    crop_fraction: float | None = Field(None, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None


class ModelChange(BaseModel):
    """What of a model can be changed after the upload."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "digits", "labels": ["zero", "one"]}]}
    )

    name: str | None = Field(None, min_length=1, max_length=200)
    input: InputChange | None = None
    labels: list[str] | None = Field(
        None, description="One per class, or per channel of the output that is explained by default"
    )


class FusionCounts(BaseModel):
    """How many normalizations went entirely, partly and not at all into other layers."""

    folded: int = 0
    partly: int = 0
    kept: int = 0


class Certificate(BaseModel):
    """The measured difference between the fused network and the file's own runtime."""

    inputs: int
    max_absolute: float
    max_relative: float
    dtype: str


class OutputInfo(BaseModel):
    """An output of a network, which `target` can name."""

    name: str
    kind: Literal["scores", "value", "vector", "map", "rows", "boxes", "tensor"] = Field(
        description="Class scores [N, classes], one number, a vector (embedding), maps [N, channels, height, width], "
        "rows of values (a detector's anchors), boxes [N, rows, 4], or anything else"
    )
    shape: list[int | None] = Field(description="A size of null follows the batch")


class Model(BaseModel):
    """A network of the store."""

    id: str = Field(description="SHA-256 of the uploaded file, or 'builtin'")
    name: str
    format: str
    created: str
    status: Literal["ready"] = "ready"
    default: bool = Field(description="Whether POST /v1/explain uses it")
    input: InputDescription
    labels: list[str] | None = Field(
        description="Names of the classes, or of the channels of the output that is explained by default"
    )
    classes: int | None = Field(description="Null where there are no class scores")
    outputs: list[OutputInfo] = Field(description="What can be explained")
    parameters: int
    fusion: FusionCounts
    certificate: Certificate
    notes: list[str]

    @computed_field(description="The output that is explained where `target` names none")  # type: ignore[prop-decorator]
    @property
    def default_output(self) -> str:
        return default_of(self.outputs).name


class Layer(BaseModel):
    """One operation of the fused network; a size of null follows the batch."""

    name: str
    op: str
    shape: list[int | None] | None


class Normalization(BaseModel):
    """What became of one normalization layer."""

    layer: str
    op: str
    outcome: Literal["folded", "partly", "kept"]
    into: list[str] = Field(description="The layers that took it")
    reason: str
    certificate: float | None = Field(
        None, description="By how much its fold alone changes the values behind it, relative to the largest"
    )


class MergedLayer(BaseModel):
    """A layer, or by the name of a sum the values themselves, that became a part of the layer it was added to."""

    layer: str
    into: str


class FusionReport(FusionCounts):
    """Where each normalization went, and why what is left could not go."""

    certificate: float | None = Field(None, description="The largest of all folds")
    rows: list[Normalization]
    merged: list[MergedLayer] = Field(
        default_factory=list, description="Layers that read the same values and were added: one layer now"
    )


class ModelDetail(Model):
    """A network with everything that is known about it."""

    fusion: FusionReport
    layers: list[Layer]


class InnerLayerInfo(BaseModel):
    """A layer whose relevance can be asked for; a size of null follows the batch."""

    name: str
    op: str
    channels: int
    shape: list[int | None]


class InnerLayerList(BaseModel):
    layers: list[InnerLayerInfo]


class ModelList(BaseModel):
    models: list[Model]


class Prediction(BaseModel):
    index: int
    label: str | None
    probability: float = Field(
        description="Of all classes together 1, or each by itself where the network ends in a sigmoid"
    )
    score: float


class Predictions(BaseModel):
    model: str
    predictions: list[Prediction]


class Target(BaseModel):
    """What was explained: a class, or a number made of an output."""

    index: int | None = Field(description="Of the class; null for anything but a class")
    label: str | None = Field(description="Of the class or the channel")
    score: float
    output: str = Field(description="The output's name")
    channel: int | None = Field(description="The one channel of it that counts")
    position: list[int] | None = Field(description="The one value of it that counts")
    places: int = Field(description="How many values count")
    explained: str = Field(
        description="All of this in words; also whether a final softmax was left out",
        examples=["the sum of channel 15 of 'out', over the 1096 places where it wins"],
    )


class Sums(BaseModel):
    """Relevance adds up: input + kept = score, up to `error`."""

    model_config = ConfigDict(extra="allow")

    score: float
    input: float
    kept: float
    error: float


class ComparedClass(BaseModel):
    index: int
    label: str | None


class ChannelRelevance(BaseModel):
    channel: int
    relevance: float


class InnerSummary(BaseModel):
    """The relevance at a layer of the network."""

    layer: str
    shape: list[int] = Field(description="Of the layer's output for one image")
    axis: int = Field(description="The channels' in it")
    channels: int
    sum: float
    grid: tuple[int, int] | None = Field(
        description="Rows and columns of the image that its places stand for, windows and tokens too; null where there "
        "are none"
    )
    outside: float | None = Field(
        description="The sum over what stands for no part of the image, as class tokens do"
    )
    top: list[ChannelRelevance] = Field(description="The channels that speak most for the target, best first")


class ExplanationSummary(BaseModel):
    """An explanation without its array. The target's score is the difference where it was compared with others.

    Only LRP has composites and keeps a ledger: for every other method `composite`, `picked`, `balanced`, `sums` and
    `ledger` are null."""

    model: str
    method: str
    composite: str | None = Field(description="LRP's, as it was asked for")
    picked: str | None = Field(
        description="The composite that was used: with `auto`, the one that suits the network"
    )
    reason: str | None = Field(None, description="With `auto`: why this one was picked")
    parameters: dict[str, Any] = Field(
        description="The composite's, or the method's options, as they were used"
    )
    prediction: Prediction | None = Field(description="Null where no class scores were explained")
    target: Target
    sum: float = Field(description="Of the relevance of all pixels")
    balanced: bool | None = Field(description="Whether input + kept = score, up to rounding")
    warnings: list[str] = Field(description="What to know before the map is trusted; empty if nothing")
    sums: Sums | None
    ledger: Any = Field(description="What each layer kept")
    timings: dict[str, float] = Field(description="Milliseconds")
    shape: list[int] = Field(description="Of the relevance: channels (1 for GradCAM), height, width")
    against: ComparedClass | Literal["others"] | None = Field(
        None, description="What the target is compared with"
    )
    through: dict[str, list[int]] | None = Field(None, description="The channels that relevance had to pass")
    inner: InnerSummary | None = Field(None, description="The relevance at the layer that was asked for")


class CompositeInfo(BaseModel):
    name: str
    description: str
    parameters: dict[str, Any] = Field(description="Names with their defaults")


class CompositeList(BaseModel):
    composites: list[CompositeInfo]
    default: str


class MethodOption(BaseModel):
    name: str
    type: Literal["integer", "number", "size", "choice", "layer"] = Field(
        description="A size is a number of pixels or HEIGHTxWIDTH, a layer the name of one"
    )
    description: str
    default: Any = Field(description="null where it follows from the image or the network")
    minimum: float | None = None
    maximum: float | None = None
    choices: list[str] | None = Field(None, description="For a choice: what there is")


class MethodInfo(BaseModel):
    name: str
    description: str
    parameters: list[MethodOption]


class MethodList(BaseModel):
    methods: list[MethodInfo]
    default: str


class Sample(BaseModel):
    name: str
    url: str


class SampleList(BaseModel):
    samples: list[Sample]


class Sandbox(BaseModel):
    """What holds the processes that read uploads."""

    layers: dict[str, str] = Field(description="The layers that are on, and how")
    missing: dict[str, str] = Field(description="The layers that this system lacks, and why")


class Health(BaseModel):
    status: str


class Readiness(Health):
    sandbox: Sandbox | None = Field(description="What uploads are read in; null until it has been tried")
