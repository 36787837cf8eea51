"""RunConfig: everything a user can set for one training, in nine sections.

Each field's docstring is its help in editors (`launch schema`). Checks that need the machines
(mesh, batch per device) are the plan's, in launcher/plan.py.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs.architectures import ARCHITECTURES

Positive = Annotated[int, Field(ge=1)]
Many = Annotated[int, Field(ge=1, le=10**12)]  # what floats still count exactly
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# Strict mode takes no list for a tuple, and YAML has only lists.
from_list = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
Rgb = Annotated[tuple[float, float, float], from_list]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The network."""

    name: Literal[tuple(ARCHITECTURES)] = "resnet50"  # type: ignore[valid-type]
    """Architecture. `resnet4` is one block of our own, for rehearsals: it compiles in seconds."""
    num_classes: Annotated[int, Field(ge=2)] = 1000
    """Width of the classifier."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`imagenet`: 7×7 stride 2 and max-pool; `small`: 3×3 stride 1, no pool (images below ~64 px)."""
    width: Positive = 64
    """Channels of the first stage; 64 is the published ResNet."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type. Parameters, batch statistics and loss are always float32."""
    batch_norm: Literal["global"] | Positive = "global"
    """Images that share batch statistics: `global` (the whole batch) or a group of n images.
    Groups that fit on one device cost no collective; global costs two per layer."""
    batch_norm_momentum: Fraction = 0.9
    """Running statistics = momentum × old + (1 − momentum) × new."""
    zero_init_last_gamma: bool = True
    """Start every residual branch at zero (Goyal et al. 2017)."""


class MeshConfig(Section):
    """The batch×model mesh of devices."""

    batch: Literal[-1] | Positive = -1
    """Devices along the batch axis; -1: all that `model` leaves."""
    model: Positive = 1
    """Devices along the model axis: output channels and the classifier are sharded over it."""


class SplitConfig(Section):
    """One split of `data.source: records`, or the size of a synthetic one."""

    path: str | None = None
    """Folder or gs:// prefix that `launch data convert` or `launch data index` has written."""
    num_examples: Many | None = None
    """Number of examples; required for `records` and `synthetic`, known for `digits`."""


class Dataset(Section):
    """What is known of a built-in dataset without opening it."""

    num_train: int
    num_eval: int
    num_classes: int


DATASETS = {"digits": Dataset(num_train=1437, num_eval=360, num_classes=10)}


class DataConfig(Section):
    """Where images come from, and what is done to them."""

    source: Literal["records", "digits", "synthetic"] = "records"
    """`records`: your own images; `digits`: scikit-learn's 1,797 handwritten digits; `synthetic`: noise,
    for benchmarks."""
    train: SplitConfig = SplitConfig()
    """Training split."""
    eval: SplitConfig = SplitConfig()
    """Held-out split."""
    image_size: Annotated[int, Field(ge=8)] = 224
    """Height and width in pixels."""
    eval_resize: Annotated[int, Field(ge=8)] | None = None
    """Short side in pixels to which evaluation images are resized before the centre crop of `image_size`;
    null: `image_size` / 0.875, as 256 for 224. `records` only."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Subtracted from images in [0, 1], per channel."""
    std: Rgb = (0.229, 0.224, 0.225)
    """Divides images in [0, 1] after the mean, per channel."""
    read_threads: NonNegative = 8
    """Threads per process that read and decode; 0 reads in the consumer."""
    prefetch_batches: Positive = 2
    """Batches per process kept ready on the host, and again on the devices."""
    shuffle: Literal["blocks", "global", "none"] = "blocks"
    """Order of each epoch. `blocks`: blocks of neighbouring records are shuffled, then records within
    windows, so that reads are large; `global`: each record by itself; `none`: as stored. Sources in memory
    take `blocks` as `global`."""
    lanes: Positive = 64
    """Blocks that a batch draws from at once, over all hosts; brought down to what divides the batch. Where
    the number of hosts divides it, no byte is read by two hosts."""
    window: Positive = 128
    """Records of a lane that are shuffled among each other. lanes × window records are in memory, over
    all hosts."""
    memory_mib: PositiveFloat = 2048.0
    """Bytes per process that reading may hold, in MiB."""
    cache: str | None = None
    """Folder on a local disk that keeps what was read from gs://, for later epochs and runs."""
    cache_gib: PositiveFloat = 200.0
    """Bound of `cache`, in GiB; what was used longest ago goes first."""
    on_bad_record: Literal["raise", "substitute", "mask"] = "raise"
    """What becomes of a record that is damaged or does not decode, after re-reading it: `raise` ends the
    run, `substitute` takes the next record, `mask` counts for nothing in loss and accuracy."""
    max_bad_records: NonNegative = 100
    """Bad records per process at which `substitute` and `mask` give up."""

    @model_validator(mode="after")
    def _source_is_told_all_it_needs(self) -> Self:
        problems = []
        known = DATASETS.get(self.source)
        for split, given in (("train", self.train), ("eval", self.eval)):
            if known and given != SplitConfig():
                problems.append(f"data.{split} is fixed for data.source = {self.source}; remove it")
            if not known and given.num_examples is None:
                problems.append(f"data.{split}.num_examples is missing; data.source = {self.source} needs it")
            if self.source == "records" and given.path is None:
                problems.append(
                    f"data.{split}.path is missing; data.source = records needs a folder or gs://…"
                )
        if self.source == "digits" and self.image_size % 8:
            problems.append(
                f"data.image_size = {self.image_size} must be a multiple of 8 for data.source = digits"
            )
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            problems.append(
                f"data.eval_resize = {self.eval_resize} is below data.image_size = {self.image_size}, "
                "which is cropped from it; raise it"
            )
        if min(self.std) <= 0:
            problems.append(f"data.std = {list(self.std)} must be above 0 in each channel")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class AugmentConfig(Section):
    """What is done to training images, and to them alone."""

    crop_scale: Annotated[tuple[float, float], from_list] = (0.08, 1.0)
    """Share of the image's area that the random crop keeps, at a width ÷ height from 3/4 to 4/3.
    `records` only."""
    antialias: bool = False
    """Filter while shrinking a random crop, as Pillow and torchvision do; slower. Evaluation always does."""
    randaugment: Annotated[tuple[NonNegative, Annotated[int, Field(le=30)]], from_list] = (0, 9)
    """RandAugment (Cubuk et al. 2019) on the host: operations an image, and their magnitude of 30;
    [0, 9]: none, [2, 9] is usual. `records` only."""
    flip: bool = True
    """Mirror half of the images, on the device."""
    color_jitter: Annotated[tuple[Fraction, Fraction, Fraction], from_list] = (0.0, 0.0, 0.0)
    """Brightness, contrast and saturation vary by factors in 1 ± these, on the device; as torchvision's
    ColorJitter."""
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a rectangle of 2 to 33 % of the image is set to the mean (Zhong et al. 2017)."""
    mixup: NonNegativeFloat = 0.0
    """α of mixup (Zhang et al. 2017): two images and their labels are blended by λ ~ Beta(α, α); 0: off."""
    cutmix: NonNegativeFloat = 0.0
    """α of CutMix (Yun et al. 2019): a rectangle of another image is pasted in; 0: off. With `mixup` too,
    each pair of images takes one of the two."""

    @model_validator(mode="after")
    def _scale_ascends(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"augment.crop_scale = {list(self.crop_scale)} must be two ascending numbers above 0, up to 1"
            )
        return self


class TrainConfig(Section):
    """The length and the arithmetic of training."""

    batch_size: Many = 256
    """Global batch: images per step over all devices."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 90.0
    """Passes over the training split."""
    steps: Many | None = None
    """Stop after this many steps instead of after `epochs`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds initialisation, sample order and augmentation."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread over all classes."""
    accumulate: Positive = 1
    """Micro-batches a step; their gradients are averaged."""
    clip_norm: PositiveFloat | None = None
    """Clip the gradient to this global norm."""
    ema_decay: Fraction | None = None
    """Keep an exponential moving average of weights and batch statistics, and evaluate that."""
    eval_every_epochs: PositiveFloat | None = 1.0
    """Epochs between evaluations; null: only at the end."""


class OptimizerConfig(Section):
    """The optimizer. Weight decay never touches batch norm or biases."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: PositiveFloat = 0.1
    """Peak learning rate at this global batch."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 term of SGD; decoupled decay of AdamW."""
    momentum: Fraction = 0.9
    """SGD only."""
    nesterov: bool = True
    """SGD only."""
    b1: Fraction = 0.9
    """AdamW only."""
    b2: Fraction = 0.999
    """AdamW only."""
    eps: PositiveFloat = 1e-8
    """AdamW only."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov = true needs momentum; set optimizer.momentum above 0")
        return self


class ScheduleConfig(Section):
    """The learning rate over time."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Linear warm-up from 0."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a fraction of the peak."""


class CheckpointConfig(Section):
    """Asynchronous Orbax checkpoints. One is also written at each evaluation and at the end."""

    directory: str | None = None
    """Folder or gs:// prefix for the checkpoints of this run, and of no other: one that another run has
    taken is refused. null: checkpoints/ in the run directory."""
    every_steps: Positive | None = None
    """Steps between checkpoints."""
    every_minutes: PositiveFloat | None = 10.0
    """Minutes between checkpoints, by the clock of process 0."""
    keep_last: Positive = 3
    """Newest checkpoints kept."""
    keep_best: NonNegative = 1
    """Best checkpoints kept, by `metric`."""
    metric: Literal["eval/accuracy", "eval/loss"] = "eval/accuracy"
    """What `best` means: highest accuracy or lowest loss."""


class LogConfig(Section):
    """Progress line and TensorBoard."""

    every_steps: Positive = 50
    """Steps between entries."""
    tensorboard: str | None = None
    """Folder or gs:// prefix for event files; null: tensorboard/ in the run directory."""
    num_images: NonNegative = 25
    """Images in the grids of inputs and of evaluation mistakes."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        known = DATASETS.get(self.data.source)
        if known and self.model.num_classes < known.num_classes:
            raise ValueError(
                f"model.num_classes = {self.model.num_classes} is too small: "
                f"data.source = {self.data.source} has {known.num_classes} classes"
            )
        if (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is odd; augment.mixup and augment.cutmix "
                "pair the images of a batch"
            )
        return self


def num_examples(data: DataConfig) -> tuple[int, int]:
    """Examples of the training and of the held-out split."""
    known = DATASETS.get(data.source)
    if known:
        return known.num_train, known.num_eval
    num_train, num_eval = data.train.num_examples, data.eval.num_examples
    assert num_train is not None  # DataConfig saw to both
    assert num_eval is not None
    return num_train, num_eval


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors (https://json-schema.org, draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
    }
