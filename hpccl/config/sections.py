"""What a run is: frozen, validated sections. No torch here, so that a login node can check a file in a moment.

Units: a weight multiplies nats; sizes are examples; lengths are optimiser steps unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

__all__ = [
    "SAMPLED_SELECTORS",
    "SELECTORS",
    "AdaptConfig",
    "AddData",
    "AnyAdaptation",
    "AnyCluster",
    "AnyEngine",
    "AnyModel",
    "AnyOptim",
    "BlurryScenario",
    "CheckpointConfig",
    "ClassScenario",
    "ClusterConfig",
    "Container",
    "CorrectConfig",
    "CropFlip",
    "CurvatureConfig",
    "DataConfig",
    "DdpEngine",
    "DeepspeedEngine",
    "DenseCurvature",
    "DiagonalCurvature",
    "DigitsStream",
    "DistillConfig",
    "DomainScenario",
    "EkfacCurvature",
    "EngineConfig",
    "EvaluateConfig",
    "FeatureSelector",
    "FewShotScenario",
    "FrompConfig",
    "Fsdp2Engine",
    "GreedySelector",
    "InlineCluster",
    "KroneckerCurvature",
    "Line",
    "ListedTasks",
    "LocalCluster",
    "LogConfig",
    "MasCurvature",
    "Measured",
    "MemoryConfig",
    "MlpModel",
    "ModelConfig",
    "NaturalMix",
    "NearestTasks",
    "NewModel",
    "NewPrecision",
    "NoAdaptation",
    "NoAugment",
    "NormalConfig",
    "OptimizerCurvature",
    "PaperModel",
    "Part",
    "PassCurvature",
    "PermutedScenario",
    "PooledTasks",
    "PosteriorSelector",
    "PriorConfig",
    "Progressive",
    "QuadraticConfig",
    "ReconstructionSelector",
    "RefitTasks",
    "RemoveData",
    "ReservoirSelector",
    "RotatedScenario",
    "ScenarioConfig",
    "ScoreSelector",
    "SelectorConfig",
    "ShardStream",
    "SiCurvature",
    "SlurmCluster",
    "StratifiedMix",
    "StreamConfig",
    "TasksConfig",
    "TimmAugment",
    "TimmModel",
    "TimmOptim",
    "TopologyConfig",
    "TrainConfig",
    "UniformSelector",
    "per_task",
]


Value = TypeVar("Value")


def _as_tuple(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,)


def per_task(values: tuple[Value, ...], task: int) -> Value:
    """The value for task `task` (from 0); the last one repeats."""
    return values[min(task, len(values) - 1)]


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# One value, or one a task (the last repeats); always stored as a tuple.
_PER_TASK = Field(min_length=1, json_schema_extra={"per_task": True})
IntPerTask = Annotated[tuple[PositiveInt, ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK]
FloatPerTask = Annotated[tuple[NonNegativeFloat, ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK]
PositiveFloatPerTask = Annotated[tuple[PositiveFloat, ...], Strict(False), BeforeValidator(_as_tuple), _PER_TASK]
Floats = Annotated[tuple[float, ...], Strict(False)]
# Text that goes into a script: a line break in it would begin another command.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", json_schema_extra={"words": "text of one line"})]
Word = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f]+$", json_schema_extra={"words": "text without spaces"})]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Memory = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]*[KMGT]?$", json_schema_extra={"words": "a size such as 64G, in quotes if a number"}),
]
TimeLimit = Annotated[
    str,
    Field(
        pattern=r"^([1-9][0-9]*|[0-9]+:[0-5][0-9]:[0-5][0-9]|[0-9]+-[0-9]{1,2}:[0-5][0-9]:[0-5][0-9])$",
        json_schema_extra={"words": "a time such as 4:00:00, 2-12:00:00, or '90' for minutes"},
    ),
]


class Section(BaseModel):
    """A part of a configuration: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


# ---------------------------------------------------------------- stream


class ClassScenario(Section):
    """Every task has classes of its own: task-incremental with train.head=own, class-incremental with seen."""

    kind: Literal["classes"] = "classes"


class DomainScenario(Section):
    """Every part is a task, and all have the same class names (domain-incremental)."""

    kind: Literal["domains"] = "domains"


class PermutedScenario(Section):
    """Every task has all images, their pixels in an order of its own; the first task's are as stored."""

    kind: Literal["permuted"] = "permuted"
    seed: NonNegativeInt = 0  # of the orders, which do not depend on the run's seed


class RotatedScenario(Section):
    """Every task has all images, turned by an angle of its own; the first task's are as stored."""

    kind: Literal["rotated"] = "rotated"
    degrees: Annotated[float, Field(gt=0, le=360)] = 180.0  # angles are below it
    angles: Literal["drawn", "even"] = "drawn"  # drawn uniformly; or degrees * task / tasks
    seed: NonNegativeInt = 0  # of drawn angles, which do not depend on the run's seed


class BlurryScenario(Section):
    """Tasks share classes: training images of a class come with other tasks, too (Blurry-M, i-Blurry-N-M).

    Test images stay with the task that most of their class belongs to.
    """

    kind: Literal["blurry"] = "blurry"
    blur: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of a blurry class's training images that other tasks get
    disjoint: Fraction = 0.5  # share of each task's classes that no other task gets images of; 0: Blurry-M
    seed: NonNegativeInt = 0  # of which images and classes, which do not depend on the run's seed


class FewShotScenario(Section):
    """A base task with all training images of `base` classes, then sessions of `way` new classes with `shots` images.

    `tasks` counts the sessions, the base included. Classes beyond base + way (tasks - 1) are left out.
    """

    kind: Literal["few_shot"] = "few_shot"
    base: PositiveInt  # classes of the first task
    way: PositiveInt  # classes of each session
    shots: PositiveInt  # training images of each class of a session
    # folder of session_2.txt, session_3.txt, ...: a training image a line, by its name (folders and extension do not
    # count) or by its number if names are numbers; session_1.txt may list those of the base. null: drawn by seed
    lists: Line | None = None
    seed: NonNegativeInt = 0  # of drawn images, which do not depend on the run's seed


ScenarioConfig = Annotated[
    ClassScenario | DomainScenario | PermutedScenario | RotatedScenario | BlurryScenario | FewShotScenario,
    Field(discriminator="kind"),
]


class DigitsStream(Section):
    """scikit-learn's 1,797 handwritten digits (8x8, 1 channel), embedded: no download."""

    kind: Literal["digits"] = "digits"
    tasks: Annotated[int, Field(gt=0, le=10)] = 5  # the ten digits are split into so many tasks
    scenario: ScenarioConfig = ClassScenario()  # what tasks have in common
    order: Literal["given", "random"] = "given"  # of the classes
    order_seed: int = 1993  # of order=random


class Part(Section):
    """One data set of shards, split into `tasks` tasks of equally many classes."""

    path: str  # folder that `hpccl shards build` wrote, or its URL in an object store (s3://, gs://, https://)
    tasks: PositiveInt = 1  # the classes are split into so many tasks
    classes: PositiveInt | None = None  # use only the first so many classes (after ordering)


class ShardStream(Section):
    """Data sets written by `hpccl shards build`, one after the other, each split by class."""

    kind: Literal["shards"] = "shards"
    parts: Annotated[tuple[Part, ...], Strict(False), Field(min_length=1)]  # the data sets, in the order of learning
    scenario: ScenarioConfig = ClassScenario()  # what tasks have in common
    order: Literal["given", "random"] = "given"  # of the classes within a part
    order_seed: int = 1993  # of order=random
    train_split: str = "train"  # name of the split to train on
    test_split: str = "test"  # name of the split to test on


StreamConfig = Annotated[DigitsStream | ShardStream, Field(discriminator="kind")]

# ---------------------------------------------------------------- data


class NoAugment(Section):
    """The evaluation view, always."""

    kind: Literal["none"] = "none"


class CropFlip(Section):
    """Zero-pad by `padding` pixels, crop back at random, mirror with probability 1/2."""

    kind: Literal["crop_flip"] = "crop_flip"
    padding: NonNegativeInt = 4  # pixels on each side
    flip: bool = True  # mirror left and right


class TimmAugment(Section):
    """timm.data.create_transform for training; see timm for the meaning of each."""

    kind: Literal["timm"] = "timm"
    scale: Floats = (0.08, 1.0)  # smallest and largest share of the picture's area that is cut out
    ratio: Floats = (0.75, 1.3333)  # smallest and largest width over height of the cut
    hflip: Fraction = 0.5  # probability of mirroring left and right
    color_jitter: NonNegativeFloat = 0.0  # strength of random brightness, contrast and saturation
    auto_augment: str | None = None  # timm's policy, such as rand-m9-mstd0.5
    random_erase: Fraction = 0.0  # probability of erasing a rectangle
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"  # of resizing


class Progressive(Section):
    """Training views that grow during a task: cheap epochs first (Touvron et al. 2019; FFCV's recipes).

    A side is linear between the epochs at `begin` and `end`, rounded to a multiple. The last epoch has image_size.
    """

    first: PositiveInt  # side of the first epochs' views, in pixels
    begin: Fraction = 0.6  # share of a task's epochs after which sides grow
    end: Fraction = 0.85  # share of a task's epochs after which they have data.image_size
    multiple: PositiveInt = 32  # of which the sides in between are multiples

    def side(self, epoch: int, epochs: int, last: int) -> int:
        """Side of the views in epoch `epoch` of `epochs`, where the last one has `last` pixels."""
        share = 1.0 if epochs <= 1 else epoch / (epochs - 1)
        if share >= self.end:
            return last
        if share <= self.begin:
            return self.first
        between = self.first + (last - self.first) * (share - self.begin) / (self.end - self.begin)
        return min(max(round(between / self.multiple) * self.multiple, self.first), last)

    def sides(self, last: int) -> tuple[int, ...]:
        """All that `side` may say, ascending."""
        start = -(-self.first // self.multiple) * self.multiple
        return tuple(sorted({self.first, *range(start, last, self.multiple), last}))


class DataConfig(Section):
    """How examples become tensors."""

    image_size: PositiveInt | None = None  # null: as stored (all images must then have one size)
    test_size: PositiveInt | None = None  # of test images; null: image_size
    progressive: Progressive | None = None  # training views that grow up to image_size; null: all have image_size
    # share of each class's training images that is tested on in place of test images, and not trained on: to choose by
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation: shorter side becomes its size / crop_pct
    mean: Floats = (0.5,)  # one for all channels, or one a channel; of pixels in [0, 1]
    std: Floats = (0.5,)  # as mean
    augment: Annotated[NoAugment | CropFlip | TimmAugment, Field(discriminator="kind")] = NoAugment()  # training
    storage: Literal["auto", "decoded", "encoded"] = "auto"  # decoded: once, kept as uint8 in a memory-mapped cache
    cache: str | None = None  # folder of decoded images; null: the user's cache folder
    shard_cache: str | None = None  # folder of shards fetched from URLs; null: the user's cache folder
    shard_gib: PositiveFloat = 100.0  # of them that are kept; those not used for longest go first
    retries: PositiveInt = 5  # attempts to fetch a shard, with growing pauses
    workers: NonNegativeInt = 2  # decoding processes per rank for storage=encoded
    shuffle_window: NonNegativeInt = 0  # shuffle within so many shards at a time; 0: over all (random reads)
    bad_images: Literal["stop", "skip"] = "stop"  # what an undecodable image does; skips are counted in the report

    def sides(self) -> tuple[int, ...]:
        """All sides that views may have, ascending; none where images have their own size."""
        if self.image_size is None:
            return ()
        training = (self.image_size,) if self.progressive is None else self.progressive.sides(self.image_size)
        return tuple(sorted({*training, self.test_size or self.image_size}))


# ---------------------------------------------------------------- model


class AnyModel(Section):
    """What every network is told."""

    # a file of first weights, .safetensors or .pth; a head of another number of classes is left out; null: random ones
    checkpoint: str | None = None


class PaperModel(AnyModel):
    """The papers' small nets: CifarNet (1.28 M parameters) and the small VGG (3.6 M)."""

    kind: Literal["cifarnet", "vgg_small"]
    dropout: bool = True  # cifarnet's .25 / .25 / .5; vgg_small has none


class MlpModel(AnyModel):
    """A multilayer perceptron with ReLU, for small images and tests."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[PositiveInt, ...], Strict(False)] = (128,)  # units of each hidden layer


class TimmModel(AnyModel):
    """Any model that timm.create_model knows."""

    kind: Literal["timm"] = "timm"
    name: str  # such as resnet18
    options: dict[str, Any] = {}  # further keyword arguments of timm.create_model


ModelConfig = Annotated[PaperModel | MlpModel | TimmModel, Field(discriminator="kind")]

# ---------------------------------------------------------------- training


class TrainConfig(Section):
    """One task's training.

    `restart` and `data` make the references: joint = seen + restart, separate = task + restart; and GDumb, which is
    memory + restart.
    """

    epochs: IntPerTask = (10,)  # one value, or one a task
    batch_size: PositiveInt = 256  # rows a step, over all ranks, memory included
    head: Literal["own", "seen"] = "own"  # which classes compete: a row's own task, or all seen so far
    # of true labels: a softmax over the classes that compete, or a sigmoid for each of them, summed (iCaRL)
    loss: Literal["cross_entropy", "sigmoid"] = "cross_entropy"
    # seen: all tasks up to now (joint); memory: the memory alone, into which the task's examples come first (GDumb)
    data: Literal["task", "seen", "memory"] = "task"
    restart: bool = False  # a fresh network for every task
    only_last: bool = False  # train the last task alone; only with restart, where earlier tasks change nothing
    accumulate: PositiveInt = 1  # micro-batches a step
    clip_norm: PositiveFloat | None = None  # largest norm of the gradient; null: no limit
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of true labels: of new and of replayed examples
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the averaged weights that end a task
    # epochs before the others of every later task, with a schedule of their own: only the new classes' rows of the last
    # layer learn
    head_epochs: NonNegativeInt = 0
    # names of parameters and buffers (with * and ?) that stay as the first task left them; `features`: all but those of
    # the last layer, `convolutions`: those of convolutions and normalisations, `old_classes`: rows of the last layer
    frozen: Annotated[tuple[str, ...], Strict(False)] = ()
    # of BatchNorm from the second task on: of the batch, or the running ones as they stand; few images say little
    norms: Literal["batch", "running"] = "batch"
    flip_test: bool = False  # evaluate on the mean of logits of an image and its mirror image
    first_task_from: str | None = None  # run folder with the same first task: take its weights, do not train it again


class AnyOptim(Section):
    """What every optimiser is told."""

    lr: PositiveFloatPerTask = (1e-3,)  # largest learning rate; one value, or one a task
    schedule: Literal["constant", "cosine", "onecycle"] = "cosine"  # of the learning rate, over one task
    warmup: Fraction = 0.0  # share of a task's steps with linear warm-up; onecycle: the rising share
    final_lr: Fraction = 0.0  # last learning rate as a share of lr


class TimmOptim(AnyOptim):
    """Optimiser by timm's factory, restarted at every task."""

    kind: Literal["timm"] = "timm"
    name: str = "adamw"  # a name that timm.optim.create_optimizer_v2 knows
    weight_decay: NonNegativeFloat = 0.0  # of weight matrices; biases and norms have none
    momentum: Fraction = 0.9  # of sgd
    options: dict[str, Any] = {}  # further keyword arguments of the optimiser


# ---------------------------------------------------------------- the past


class NaturalMix(Section):
    """Shuffle the union of the task and the memory: every example once an epoch."""

    kind: Literal["natural"] = "natural"


class StratifiedMix(Section):
    """A fixed share of memory rows in every step, weighted so that the expected objective stays the same."""

    kind: Literal["stratified"] = "stratified"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of a step's rows


class UniformSelector(Section):
    """A uniform sample of the task, without replacement: the smallest hashes of (seed, task, example)."""

    kind: Literal["uniform"] = "uniform"


class ReservoirSelector(Section):
    """The smallest hashes of (seed, example). With memory.total: a uniform sample of all that was ever seen."""

    kind: Literal["reservoir"] = "reservoir"


class GreedySelector(Section):
    """One example after the other: kept if its class has fewer than its share, in place of one of the largest class.

    GDumb's sampler (Prabhu et al. 2020), over the task's examples in a random order. With memory.total: over all that
    was ever seen.
    """

    kind: Literal["greedy"] = "greedy"


class ScoreSelector(Section):
    """The largest scores of the network that ends the task, among the classes that compete.

    gini: 1 - sum p^2 (FROMP's lambda); error: -log p of the true label, nats; residual: |p - y|^2 (K-priors).
    """

    kind: Literal["gini", "error", "residual"]
    sampled: bool = False  # draw with probabilities that grow with the score, and weigh by them


class PosteriorSelector(Section):
    """The largest scores of the Laplace posterior on the task: of the last layer, as one Kronecker product, or of all.

    leverage: tr(Lambda_i v_i), v_i the variance of the logits; sensitivity: sum_c |lambda_ic v_ic e_ic|, e = p - y
    (memory perturbation).
    """

    kind: Literal["leverage", "sensitivity"]
    sampled: bool = False  # draw with probabilities that grow with the score, and weigh by them
    prior_precision: PositiveFloat = 1.0  # of the weights' normal prior
    # whose weights are uncertain: last_layer: those of the last; all: a Kronecker product a layer, and as many backward
    # passes for every example of the task as classes compete
    network: Literal["last_layer", "all"] = "last_layer"


class FeatureSelector(Section):
    """Greedily by class, from what the last layer sees.

    herding: the running mean of normalised features stays closest to the class's (iCaRL); k_center: always the example
    that is farthest from those chosen.
    """

    kind: Literal["herding", "k_center"]


class ReconstructionSelector(Section):
    """Greedily by class, with weights: the weighted sum of the last layer's gradients comes close to the task's.

    Gradients are those at the weights that end the task and at `probes` random steps of the last layer from them, less
    what a quadratic says of these steps if the prior has one; in a random projection.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    probes: NonNegativeInt = 4  # random steps of the last layer
    radius: PositiveFloat = 1.0  # standard deviation of the change of a logit by such a step
    projection: PositiveInt = 512  # numbers that stand for a gradient
    ridge: PositiveFloat = 0.01  # pull of the weights to equal ones


SelectorConfig = Annotated[
    UniformSelector
    | ReservoirSelector
    | GreedySelector
    | ScoreSelector
    | PosteriorSelector
    | FeatureSelector
    | ReconstructionSelector,
    Field(discriminator="kind"),
]


# Kinds that choose within a task, in the order of the union above (a reservoir is a uniform sample there), and those of
# them that can be drawn with chances.
_SELECTORS = (UniformSelector, ScoreSelector, PosteriorSelector, FeatureSelector, ReconstructionSelector)
SELECTORS: tuple[str, ...] = tuple(
    kind for each in _SELECTORS for kind in get_args(each.model_fields["kind"].annotation)
)
SAMPLED_SELECTORS: tuple[str, ...] = tuple(
    kind
    for each in _SELECTORS
    if "sampled" in each.model_fields
    for kind in get_args(each.model_fields["kind"].annotation)
)


class MemoryConfig(Section):
    """Examples of past tasks that are kept. Their number is `size`, `total` or `fraction`."""

    size: NonNegativeInt = 0  # examples kept of each task
    total: NonNegativeInt = 0  # examples kept of all tasks together; earlier tasks give up theirs as more come
    fraction: Fraction = 0.0  # share of each task's examples that is kept
    selector: SelectorConfig = UniformSelector()  # which examples are kept
    balanced: bool = True  # equally many of each class
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"  # of stored soft labels
    # renewed: soft labels are the newest network's; kept: those of the network that ended the example's own task (DER)
    labels: Literal["renewed", "kept"] = "renewed"
    mix: Annotated[NaturalMix | StratifiedMix, Field(discriminator="kind")] = NaturalMix()  # of new and memory rows
    # of the images: reference: they stay in the stream's shards; copy: they are copied to the run folder, byte by byte,
    # and the training shards of finished tasks may be removed
    keep: Literal["reference", "copy"] = "reference"

    @property
    def kept(self) -> bool:
        """Whether there is a memory."""
        return self.size > 0 or self.total > 0 or self.fraction > 0


class QuadraticConfig(Section):
    """weight/2 (w - anchor)' (F + damping) (w - anchor), F summed over the examples that are not in memory."""

    weight: NonNegativeFloat = 0.0  # lambda; 1 is the un-tempered value
    damping: NonNegativeFloat = 1e-3  # delta
    # newest: one quadratic around the newest weights; each: every task's own around the weights at its end
    anchor: Literal["newest", "each"] = "newest"
    # what is left of all earlier tasks' curvature when one ends; below 1: online EWC (Schwarz et al. 2018)
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0


class NormalConfig(Section):
    """The weights' normal prior N(0, 1/precision): precision/2 |w|^2 beside the nats of all examples.

    After the first task it is weight * precision/2 |w - w*|^2 around the newest weights w*, the divergence of weights
    of K-priors (Khan and Swaroop 2021); where all the past is trained on again, it stays around 0.
    """

    precision: NonNegativeFloat = 0.0  # delta, nats per squared weight, of every trainable weight alike
    weight: NonNegativeFloat = 1.0  # tau of the pull to the newest weights


class FrompConfig(Section):
    """weight/2 sum over past tasks and classes of (m - m_old)' K^-1 (m - m_old), m the probabilities of memory.

    The functional regularisation of FROMP (Pan et al. 2020). It takes the place of soft labels and replay; `curvature`
    is then measured on all examples of a task, memory included.
    """

    weight: NonNegativeFloat = 0.0  # the published code's 1 / tau, times the task's examples; 0: no such term
    # posterior: K = J (F + precision)^-1 J' + jitter, F the curvature of all past tasks; identity: K = 1
    kernel: Literal["posterior", "identity"] = "posterior"
    precision: PositiveFloat = 1e-3  # delta of the posterior
    jitter: PositiveFloat = 1e-5  # on K's diagonal; ten times as much, and again, where rounding asks for it
    # examples of a past task that are recalled in a step and coupled by K, in turn; null: all of them
    block: PositiveInt | None = None


class DistillConfig(Section):
    """What the previous network says of a task's images, beside their labels (LwF; Li and Hoiem 2016).

    One row for each old head (train.head=own), or one over all old classes (seen); a sigmoid a class where train.loss
    says so.
    """

    weight: NonNegativeFloat = 0.0  # lambda_o, of every old head's row; 0: off
    temperature: PositiveFloat = 2.0  # divides the logits of both networks
    scale_t2: bool = False  # multiply by temperature^2, so that gradients do not shrink with it
    # recorded: of the evaluation view, once as the task begins; same: of the student's view, in every step
    view: Literal["recorded", "same"] = "recorded"
    images: Literal["new", "all"] = "new"  # all: of memory's images, too
    # fixed: labels count 1 beside it; classes: weight * n / (n + m) and m / (n + m), of n old and m new classes (BiC)
    balance: Literal["fixed", "classes"] = "fixed"


class CorrectConfig(Section):
    """Two numbers that take back what the newest classes' logits have too much of (BiC; Wu et al. 2019).

    They are fitted, when training on a task has ended, to examples that no network ever learned from: equally many of
    every class, out of memory.total, and held out of the task.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of memory.total that is held out for it; 0: no correction
    penalty: NonNegativeFloat = 0.1  # of beta^2 / 2, beside the mean nats; 0: there may be no best beta


class TopologyConfig(Section):
    """A neural gas over the features of the first task, whose nodes later tasks keep in place (TOPIC: Tao et al. 2020).

    anchor * mean over old nodes of AL + minmax * mean over new examples of MML, see docs/methods.md.
    """

    nodes: NonNegativeInt = 0  # nodes of the first task (400 in the paper); 0: no topology
    new_nodes: PositiveInt = 1  # nodes of each later class; fewer than its examples
    passes: PositiveInt = 1  # over the first task's examples
    rate: Annotated[float, Field(gt=0, le=1)] = 0.02  # of neural gas
    spread: PositiveFloat = 10.0  # alpha of neural gas: nodes of rank i move by exp(-i / spread)
    first_rank: Literal[0, 1] = 1  # rank of the nearest node
    lifetime: PositiveInt = 200  # age beyond which an edge goes
    normalised: bool = True  # features at norm 1
    anchor: NonNegativeFloat = 0.5  # lambda_1, of the anchor loss
    minmax: NonNegativeFloat = 0.005  # lambda_2, of the min-max loss
    margin: PositiveFloat | None = None  # xi, distance that rivals are pushed to; null: the largest one of two nodes
    # where the images of old nodes should stay: at the node, or where the last network saw them
    target: Literal["centroid", "image"] = "centroid"
    floor: PositiveFloat = 0.1  # added to variances, in multiples of the mean variance of features


class PriorConfig(Section):
    """What the past says while a new task is learned."""

    quadratic: QuadraticConfig = QuadraticConfig()  # EWC
    normal: NormalConfig = NormalConfig()  # of the weights; with soft-labelled memory, K-priors
    fromp: FrompConfig = FrompConfig()  # coupled predictions on memory
    weight: FloatPerTask = (1.0,)  # tau of a memory example, by the task it comes from
    scale_to_task: bool = False  # tau * N_s / m: memory stands for its whole task
    scale_to_new: bool = False  # tau * N_t / M: all memory together counts as much as the new task (ER, DER)
    replay: Fraction = 0.0  # share of memory with true labels; the rest has the old model's soft labels
    # beta, in tau's place: soft-labelled memory also speaks by its true labels, with this weight (DER++)
    label_weight: NonNegativeFloat = 0.0
    # of soft labels: of probabilities; or squared differences of logits, their mean over classes (DER)
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    temperature: PositiveFloat = 1.0  # of the soft labels
    # stored: student and label on one stored view; teacher: the old model labels the student's view;
    # recorded: label of the stored view, student on a fresh view (the published code)
    view: Literal["stored", "teacher", "recorded"] = "stored"
    distill: DistillConfig = DistillConfig()  # the previous network on the task's own images
    correct: CorrectConfig = CorrectConfig()  # of the logits of the newest classes
    topology: TopologyConfig = TopologyConfig()  # a net of nodes over features


class EvaluateConfig(Section):
    """How the network is tested."""

    # nearest_mean: the class whose mean of normalised features, over memory and its mirror images, is closest (iCaRL)
    # prototype: the same, over a class's training examples when it was learned: prototypes on frozen features
    classifier: Literal["head", "nearest_mean", "prototype"] = "head"


class ListedTasks(Section):
    """Every task's own factors, exactly, as long as they fit; then the closest terms of each layer are merged.

    A merge is the nearest Kronecker product of two terms. Its error is known before it is made; one that would take a
    layer beyond `tolerance` is not made, and then the list stays larger than it should.
    """

    kind: Literal["list"] = "list"
    max_gib: PositiveFloat = 4.0  # of all factors on all ranks together
    max_cost: PositiveFloat = 4.0  # of one step's pull, in multiples of the exact pull of one task
    tolerance: Annotated[float, Field(ge=0)] = 0.1  # largest error of a layer's sum, relative, Frobenius norm


class PooledTasks(Section):
    """One pair a layer: input factors averaged over examples, gradient factors summed (online Laplace)."""

    kind: Literal["pooled"] = "pooled"


class NearestTasks(Section):
    """One pair a layer: the nearest Kronecker product of the sum so far and the new task (Van Loan, Pitsianis 1993)."""

    kind: Literal["nearest"] = "nearest"


class RefitTasks(Section):
    """One eigenbasis a layer, that of the nearest pair, with the exact diagonal of the sum in it (EKFAC)."""

    kind: Literal["refit"] = "refit"


TasksConfig = Annotated[ListedTasks | PooledTasks | NearestTasks | RefitTasks, Field(discriminator="kind")]


class Measured(Section):
    """What every kind of curvature measures."""

    # exact over labels, labels drawn from the model, true labels; weighted: true ones, by their probability (Mammoth)
    fisher: Literal["ggn", "mc", "empirical", "weighted"] = "ggn"
    samples: PositiveInt = 1  # labels drawn per example for fisher=mc
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the task's examples that is used
    batch_size: PositiveInt = 256  # examples at a time; changes memory use, not the result


class LayerMeasured(Measured):
    """What both Kronecker kinds measure of a layer."""

    # exact over labels, labels drawn from the model, true labels; weighted: true ones, by their probability (Mammoth)
    fisher: Literal["ggn", "mc", "empirical", "weighted"] = "mc"
    sharing: Literal["expand", "reduce"] = "expand"  # of a weight over positions: each counts alone, or their mean does
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward and backward pass; sums are always fp32
    max_factor: PositiveInt = 16384  # largest side of a factor; 16384 is 1 GiB
    # layers (module names, with * and ?) that get the diagonal instead, like all that is no linear map or convolution
    diagonal: Annotated[tuple[str, ...], Strict(False)] = ()


class KroneckerCurvature(LayerMeasured):
    """K-FAC: a Kronecker product for each layer, exact diagonal for norms, embeddings and free parameters."""

    kind: Literal["kronecker"] = "kronecker"
    tasks: TasksConfig = ListedTasks()  # how the curvatures of several tasks become one
    keep_trace: Annotated[float, Field(gt=0, le=1)] = 1.0  # below 1: low-rank factors that keep this share of the trace


class EkfacCurvature(LayerMeasured):
    """EKFAC: K-FAC's eigenbasis with the exact diagonal in it, from a second pass; tasks are summed by refitting."""

    kind: Literal["ekfac"] = "ekfac"


class DiagonalCurvature(Measured):
    """Diagonal of the Fisher matrix, exact per example."""

    kind: Literal["diagonal"] = "diagonal"
    # examples whose gradients are averaged before they are squared. Above 1 it is no Fisher matrix, and up to so many
    # times smaller, but it is what Avalanche takes for one; with fisher=empirical
    group: PositiveInt = 1


class MasCurvature(Section):
    """Memory Aware Synapses (Aljundi et al. 2018): how much a weight moves the squared norm of the own head's logits.

    Omega = mean_i |d |z_i|^2 / dw|, no labels; the quadratic is then weight * sum Omega (w - a)^2 beside the mean loss
    of a new task of as many examples. Exact per example, whatever the batch and the number of processes.
    """

    kind: Literal["mas"] = "mas"
    # global: of the network's output; local: of every layer's own output, its input held constant (Hebbian)
    variant: Literal["global", "local"] = "global"
    # examples whose gradients are averaged before their absolute values are taken. Above 1 signs cancel, as they do in
    # the authors' code (200) and in Avalanche; with variant=global
    group: PositiveInt = 1
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the task's examples that is used
    batch_size: PositiveInt = 256  # examples at a time; changes memory use, not the result


class SiCurvature(Section):
    """Synaptic Intelligence (Zenke et al. 2017): what each weight did for the loss while it was learned.

    Omega = max(omega, 0) / (distance^2 + xi), no pass over the task; the quadratic is that of kind=mas with this Omega.
    """

    kind: Literal["si"] = "si"
    xi: PositiveFloat = 0.1  # beside the squared way that a weight went in a task, by which what it did is divided
    # task: what a step did for the loss; total: for the loss and the quadratic together (Avalanche)
    gradient: Literal["task", "total"] = "task"
    limit: PositiveFloat | None = None  # largest Omega that a task adds to a weight's; null: none
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of a pass over the task: there is none, leave it 1
    batch_size: PositiveInt = 256  # examples at a time, of other passes over a task


class DenseCurvature(Measured):
    """The whole matrix, for small networks and tests."""

    kind: Literal["dense"] = "dense"
    max_parameters: PositiveInt = 10000  # a larger network is refused; 10000 is 0.4 GB


class OptimizerCurvature(Measured):
    """The diagonal that the optimiser has learned: no pass over the task. ivon, vogn, soba, adam, adamw or rmsprop."""

    kind: Literal["optimizer"] = "optimizer"


PassCurvature: TypeAlias = KroneckerCurvature | EkfacCurvature | DiagonalCurvature | MasCurvature | DenseCurvature
CurvatureConfig = Annotated[PassCurvature | SiCurvature | OptimizerCurvature, Field(discriminator="kind")]

# ---------------------------------------------------------------- adaptation


class NoAdaptation(Section):
    """A run of its own."""

    kind: Literal["none"] = "none"


class AnyAdaptation(Section):
    """What every adaptation of a trained network is told; written by `hpccl adapt`."""

    source: str  # folder of the run whose network is adapted
    task: NonNegativeInt  # the network after this task of it, counted from 0: its last
    retrain: bool = False  # the reference: learn anew from all examples that the adapted network stands for


class AddData(AnyAdaptation):
    """Further examples of known classes."""

    kind: Literal["add"] = "add"
    data: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]  # folders or URLs of shards


class RemoveData(AnyAdaptation):
    """Fewer examples: as if some had never been learned."""

    kind: Literal["remove"] = "remove"
    names: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]  # classes, or ids `<data set>/<key>`


class NewPrecision(AnyAdaptation):
    """Another normal prior of the weights."""

    kind: Literal["precision"] = "precision"
    precision: NonNegativeFloat  # takes the place of prior.normal.precision


class NewModel(AnyAdaptation):
    """Another network, which `model` names."""

    kind: Literal["model"] = "model"


AdaptConfig = Annotated[NoAdaptation | AddData | RemoveData | NewPrecision | NewModel, Field(discriminator="kind")]

# ---------------------------------------------------------------- machinery


class AnyEngine(Section):
    """What every engine is told."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay fp32
    channels_last: bool = False  # memory layout of images (ddp: and of convolutions); often faster with bf16
    recompute: bool = False  # activation checkpointing of timm models: less memory, a forward pass more


class DdpEngine(AnyEngine):
    """Every rank holds the model; gradients are averaged. One process is the same code."""

    kind: Literal["ddp"] = "ddp"
    compile: bool = False  # torch.compile


class Fsdp2Engine(AnyEngine):
    """Weights, gradients and optimiser state in shards (torch.distributed.fsdp.fully_shard)."""

    kind: Literal["fsdp2"] = "fsdp2"
    compile: bool = False  # torch.compile, block by block
    shard_size: PositiveInt | None = None  # ranks that share one copy, such as those of a node; null: all of them
    reshard: bool = True  # let a block's weights go between forward and backward; false: more memory, less traffic
    offload: bool = False  # shards of weights, gradients and optimiser state in host memory


class DeepspeedEngine(AnyEngine):
    """DeepSpeed ZeRO."""

    kind: Literal["deepspeed"] = "deepspeed"
    # what is in shards: 0 nothing, 1 optimiser state, 2 and gradients, 3 and weights
    stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: bool = False  # optimiser state in host memory; stages 1 to 3
    offload_weights: bool = False  # shards of weights in host memory; stage 3
    deepspeed: dict[str, Any] = {}  # further settings in DeepSpeed's own words; none that hpccl sets


EngineConfig = Annotated[DdpEngine | Fsdp2Engine | DeepspeedEngine, Field(discriminator="kind")]


class CheckpointConfig(Section):
    """When to save and how many to keep. The end of every task is always kept."""

    every: NonNegativeInt = 500  # steps; 0: only at the end of a phase
    keep: PositiveInt = 2  # newest ones kept within a task
    background: bool = False  # write while training goes on; a step waits for the copy to host memory only


class LogConfig(Section):
    """What is written while running."""

    every: PositiveInt = 20  # steps between two lines of loss terms
    quiet: bool = False  # no progress display
    tensorboard: bool = True  # write curves to the run folder
    reconstruction: Fraction = 0.0  # share of the past on which the gradient-reconstruction error is measured


class AnyCluster(Section):
    """What every kind of cluster is told."""

    threads: PositiveInt | None = None  # of each process; null: an equal share of the cores
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0  # seconds that a process waits for another before it ends


class InlineCluster(AnyCluster):
    """This process alone."""

    kind: Literal["inline"] = "inline"

    @property
    def nodes(self) -> int:
        """Machines."""
        return 1

    @property
    def nproc(self) -> int:
        """Processes on each machine."""
        return 1


class LocalCluster(AnyCluster):
    """Processes on this machine."""

    kind: Literal["local"] = "local"
    nproc: PositiveInt = 1  # processes; one a GPU, or a few a CPU
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0: a free one

    @property
    def nodes(self) -> int:
        """Machines."""
        return 1


class Container(Section):
    """An image in which processes run, by pyxis (srun --container-image)."""

    image: Line  # a .sqsh file or what enroot can import
    mounts: Annotated[tuple[Line, ...], Strict(False)] = ()  # HOST:INSIDE; the folder of the command is always mounted
    home: bool = False  # mount the home folder


class SlurmCluster(AnyCluster):
    """Jobs of a SLURM cluster, for `hpccl submit`."""

    kind: Literal["slurm"] = "slurm"
    nodes: PositiveInt = 1  # machines
    gpus: NonNegativeInt = 0  # of each node; one process each
    tasks: PositiveInt | None = None  # processes on each node; null: one a GPU, or one
    cpus: PositiveInt = 1  # cores of each process
    mem: Memory | None = None  # of each node; null: the cluster's default
    time: TimeLimit = "1:00:00"  # limit; h:mm:ss, d-hh:mm:ss or minutes
    partition: Word | None = None  # null: the cluster's default
    account: Word | None = None  # whom to charge
    qos: Word | None = None  # quality of service
    constraint: Line | None = None  # features that nodes must have
    exclude: Word | None = None  # nodes to avoid
    array: PositiveInt = 256  # runs of a sweep that may run at the same time
    save: PositiveInt = 120  # seconds before the time limit at which a run saves and asks to be queued again
    restarts: NonNegativeInt = 1000  # how often a job may be queued again by itself
    interface: Word | None = None  # network of NCCL and gloo, such as ib0; null: theirs to choose
    container: Container | None = None  # null: none
    modules: Annotated[tuple[Line, ...], Strict(False)] = ()  # `module load` each before the start
    setup: Annotated[tuple[Line, ...], Strict(False)] = ()  # further lines of shell before the start
    environment: dict[Variable, Line] = {}  # further variables of all processes
    python: Line | None = None  # interpreter on the nodes; null: the one that submits
    srun: Annotated[tuple[Line, ...], Strict(False)] = ()  # further arguments of srun, such as --gpu-bind=none
    extra: dict[str, bool | int | Line] = {}  # further parameters of sbatch, by their long names without dashes

    @property
    def nproc(self) -> int:
        """Processes on each machine."""
        return self.tasks or self.gpus or 1


ClusterConfig = Annotated[InlineCluster | LocalCluster | SlurmCluster, Field(discriminator="kind")]
