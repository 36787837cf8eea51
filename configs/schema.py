"""RunConfig: everything a user can set for one training run, in nine sections.

Each field's docstring is its help in editors (`launch schema`) and its row in docs/configs.md. Checks that
need the cluster (mesh, batch per device) belong to the plan.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs.architectures import ARCHITECTURES

Positive = Annotated[int, Field(ge=1)]
# Epochs and rates are computed in floats, which hold every whole number up to 2**53.
Many = Annotated[int, Field(ge=1, le=10**12)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# Strict mode refuses a list for a tuple, and YAML has no tuples.
from_list = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
Rgb = Annotated[tuple[float, float, float], from_list]


class Section(BaseModel):
    """Base of every section. Unknown keys and values of another type are errors, so that a typo cannot be ignored."""

    # frozen: the launcher, the plan and the workers share one config, and none may change it for the others.
    # strict: without it, pydantic would read "64" or true as a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The network."""

    # One source of names: mypy cannot check a Literal that is computed, pydantic can.
    name: Literal[tuple(ARCHITECTURES)] = "resnet50"  # type: ignore[valid-type]
    """Architecture. `resnet4`, a single block that was never published, compiles in seconds, for rehearsals."""
    num_classes: Annotated[int, Field(ge=2)] = 1000
    """Number of classes, which is the width of the classifier."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`imagenet`: 7×7 stride 2 and max-pool; `small`: 3×3 stride 1, no pool (images below ~64 px)."""
    width: Positive = 64
    """Channels of the first stage; 64 is the published ResNet."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type. Parameters, batch statistics and loss are always float32."""
    batch_norm: Literal["global"] | Positive = "global"
    """Images that share batch statistics: `global` (the whole batch) or a group of n images.
    Groups that fit on one device need no communication; `global` needs two collectives per layer."""
    batch_norm_momentum: Fraction = 0.9
    """Running statistics = momentum × old + (1 − momentum) × new."""
    zero_init_last_gamma: bool = True
    """Start every residual branch at zero (Goyal et al. 2017, https://arxiv.org/abs/1706.02677)."""


class MeshConfig(Section):
    """The batch×model mesh of devices."""

    batch: Literal[-1] | Positive = -1
    """Devices along the batch axis; -1 uses all devices that `model` leaves."""
    model: Positive = 1
    """Devices along the model axis, over which output channels and the classifier are sharded."""


class SplitConfig(Section):
    """One split of `data.source: records`, or the size of a synthetic one."""

    path: str | None = None
    """Folder or gs:// prefix that `launch data convert` or `launch data index` wrote."""
    num_examples: Many | None = None
    """Number of examples; required for `records` and `synthetic`, fixed for `digits`."""


class Dataset(Section):
    """Facts about a built-in dataset that the plan needs before anything opens the dataset."""

    num_train: int
    num_eval: int
    num_classes: int


# https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html: 1,797 digits, which the
# trainer splits. Written here because importing scikit-learn to count them would slow every plan.
DATASETS = {"digits": Dataset(num_train=1437, num_eval=360, num_classes=10)}


class DataConfig(Section):
    """Where images come from, and how they are read."""

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
    null: `image_size` / 0.875, such as 256 for 224. `records` only."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Mean per channel, subtracted from images in [0, 1]."""
    std: Rgb = (0.229, 0.224, 0.225)
    """Standard deviation per channel, by which images are divided after `mean` is subtracted."""
    read_threads: NonNegative = 8
    """Threads per process that read and decode; 0 reads in the thread that takes the batches."""
    prefetch_batches: Positive = 2
    """Batches per process that are kept ready on the host, and as many again on the devices."""
    shuffle: Literal["blocks", "global", "none"] = "blocks"
    """Order of each epoch. `blocks`: blocks of neighbouring records are shuffled, then records within
    windows, so that reads are large; `global`: each record is shuffled by itself; `none`: the stored order.
    For sources in memory, `blocks` is the same as `global`."""
    lanes: Positive = 64
    """Blocks that a batch draws from at once, over all hosts; lowered to a number that divides the batch. If
    the number of hosts divides it, no two hosts read the same byte."""
    window: Positive = 128
    """Records of a lane that are shuffled among each other. Over all hosts, lanes × window records are in
    memory."""
    memory_mib: PositiveFloat = 2048.0
    """Memory per process that reading may use, in MiB."""
    cache: str | None = None
    """Folder on a local disk that keeps blocks read from gs:// for later epochs and runs."""
    cache_gib: PositiveFloat = 200.0
    """Size limit of `cache`, in GiB; the least recently used blocks are deleted first."""
    on_bad_record: Literal["raise", "substitute", "mask"] = "raise"
    """Policy for a record that is still damaged after it was read again, or does not decode: `raise` ends the
    run, `substitute` uses the next record, `mask` leaves the record out of loss and accuracy."""
    max_bad_records: NonNegative = 100
    """Bad records per process at which `substitute` and `mask` end the run."""

    @model_validator(mode="after")
    def _source_is_told_all_it_needs(self) -> Self:
        # Pydantic stops at the first ValueError of a validator: one error with a line each reports all.
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
        # A digit has 8×8 pixels, and the trainer enlarges it by repeating pixels.
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
    """Augmentation of the training images; evaluation images are never augmented."""

    crop_scale: Annotated[tuple[float, float], from_list] = (0.08, 1.0)
    """Share of the image's area that the random crop keeps, at a width ÷ height from 3/4 to 4/3.
    `records` only."""
    antialias: bool = False
    """Shrink random crops with antialiasing, like Pillow and torchvision; slower. Evaluation always does."""
    randaugment: Annotated[tuple[NonNegative, Annotated[int, Field(le=30)]], from_list] = (0, 9)
    """RandAugment (Cubuk et al. 2019) on the host: operations per image, and their magnitude out of 30;
    [0, 9] is off, [2, 9] is usual. `records` only."""
    flip: bool = True
    """Mirror half of the images, chosen at random, on the device."""
    color_jitter: Annotated[tuple[Fraction, Fraction, Fraction], from_list] = (0.0, 0.0, 0.0)
    """Brightness, contrast and saturation are scaled by random factors in 1 ± these values, on the device, as by
    torchvision's ColorJitter."""
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a rectangle of 2 to 33 % of the image is replaced by the mean (Zhong et al. 2017)."""
    mixup: NonNegativeFloat = 0.0
    """α of mixup (Zhang et al. 2017): two images and their labels are blended by λ ~ Beta(α, α); 0: off."""
    cutmix: NonNegativeFloat = 0.0
    """α of CutMix (Yun et al. 2019): a rectangle of another image is pasted in; 0: off. If `mixup` is also on,
    each pair of images uses one of the two."""

    @model_validator(mode="after")
    def _scale_ascends(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"augment.crop_scale = {list(self.crop_scale)} must be two ascending numbers above 0, up to 1"
            )
        return self


class TrainConfig(Section):
    """Length of training, and the computation of each step."""

    batch_size: Many = 256
    """Global batch: images per step over all devices."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 90.0
    """Passes over the training split."""
    steps: Many | None = None
    """Stop after this many steps instead of after `epochs`."""
    # Outside its 64-bit mode, jax truncates a seed to 32 bits: two larger seeds could be the same training.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, sample order and augmentation."""
    label_smoothing: Fraction = 0.0
    """Share of the target that is spread over all classes."""
    accumulate: Positive = 1
    """Micro-batches per step, whose gradients are averaged."""
    clip_norm: PositiveFloat | None = None
    """Global norm to which the gradient is clipped; null: no clipping."""
    ema_decay: Fraction | None = None
    """Decay of an exponential moving average of weights and batch statistics, which evaluation uses; null: none."""
    eval_every_epochs: PositiveFloat | None = 1.0
    """Epochs between evaluations; null: only at the end."""


class OptimizerConfig(Section):
    """The optimizer. Weight decay never touches batch norm or biases."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: PositiveFloat = 0.1
    """Peak learning rate for the global batch as it is: podlaunch does not scale it."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty for SGD; decoupled weight decay for AdamW."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Use Nesterov momentum. SGD only."""
    b1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    b2: Fraction = 0.999
    """Decay of AdamW's second moment."""
    eps: PositiveFloat = 1e-8
    """Term that AdamW adds to its denominator."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov = true needs momentum; set optimizer.momentum above 0")
        return self


class ScheduleConfig(Section):
    """The learning rate over time."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of linear warm-up from 0."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a fraction of the peak."""


class CheckpointConfig(Section):
    """Asynchronous Orbax checkpoints. The run also saves one before each evaluation and at the end."""

    directory: str | None = None
    """Folder or gs:// prefix for the checkpoints of this run alone; a place that belongs to another run is
    refused. null: checkpoints/ in the run directory."""
    every_steps: Positive | None = None
    """Steps between checkpoints; null: off."""
    every_minutes: PositiveFloat | None = 10.0
    """Minutes between checkpoints, by the clock of process 0; null: off."""
    keep_last: Positive = 3
    """Number of newest checkpoints to keep."""
    keep_best: NonNegative = 1
    """Number of best checkpoints to keep, by `metric`."""
    metric: Literal["eval/accuracy", "eval/loss"] = "eval/accuracy"
    """Metric of `keep_best`: highest accuracy or lowest loss."""


class LogConfig(Section):
    """The progress line and TensorBoard."""

    every_steps: Positive = 50
    """Steps between log entries."""
    tensorboard: str | None = None
    """Folder or gs:// prefix for event files; null: tensorboard/ in the run directory."""
    num_images: NonNegative = 25
    """Images in each grid, of inputs and of evaluation mistakes; 0: no grids."""


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
        # Mixup and CutMix blend each image with its neighbour in the batch, so that no device needs another's.
        if (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is odd; augment.mixup and augment.cutmix "
                "pair the images of a batch"
            )
        return self


def num_examples(data: DataConfig) -> tuple[int, int]:
    """Numbers of examples of the training split and of the held-out split."""
    known = DATASETS.get(data.source)
    if known:
        return known.num_train, known.num_eval
    num_train, num_eval = data.train.num_examples, data.eval.num_examples
    # DataConfig has refused a source without both numbers; mypy cannot know.
    assert num_train is not None
    assert num_eval is not None
    return num_train, num_eval


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors (https://json-schema.org/draft/2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
    }
