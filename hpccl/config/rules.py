"""Combinations that say two things at once, or something that would be ignored. Defaults never clash."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.adaptation import AddData, AnyAdaptation, NewModel, NewPrecision
from hpccl.config.clash import Clash
from hpccl.config.curvature import (
    DiagonalCurvature,
    KroneckerCurvature,
    MasCurvature,
    Measured,
    OptimizerCurvature,
    SiCurvature,
)
from hpccl.config.data import DataConfig, TimmAugment
from hpccl.config.engine import DdpEngine, DeepspeedEngine
from hpccl.config.machine_rules import deepspeed, slurm
from hpccl.config.memory import GreedySelector, MemoryConfig, ReconstructionSelector, StratifiedMix
from hpccl.config.model import TimmModel
from hpccl.config.optim import (
    LEARNING_SQUARES,
    TimmOptim,
    VognOptim,
)
from hpccl.config.prior import DistillConfig, FrompConfig, NormalConfig, PriorConfig
from hpccl.config.stream import (
    BlurryScenario,
    DigitsStream,
    DomainScenario,
    FewShotScenario,
    PermutedScenario,
    RotatedScenario,
)

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["clashes"]

# Optimisers that treat every weight by itself, so that a part of a tensor is updated as the whole would be. Others
# (lamb, adafactor, muon, ...) take norms of whole tensors. Adagrad would be one of these, but makes its state before
# there are shards.
_ELEMENTWISE = {
    *("sgd", "momentum", "sgdw", "adam", "adamw", "adamax", "nadam", "nadamw", "radam", "adabelief", "adan"),
    *("adopt", "adoptw", "laprop", "lion", "rmsprop", "rmsproptf", "adadelta"),
}
# Transformers of timm whose name says the one size that they take unless they are told otherwise. Whatever else does
# not take several sizes is noticed when the network is built.
_SIZED = re.compile(r"(vit|deit3?|swin|swinv2|eva|eva02)_(?!s?relpos|intern)\w*_\d{3}")
# Kinds of optimisers that learn a curvature; of timm's, those with LEARNING_SQUARES do.
_LEARNING = ("ivon", "vogn", "soba")


def clashes(config: RunConfig) -> tuple[Clash, ...]:
    """Every combination in `config` that cannot be meant."""
    rules = (
        _parts_of_scenario,
        _changed_images,
        _few_shots,
        _shared_classes,
        _one_budget,
        _selector,
        _needs_memory,
        _copies,
        _needs_soft_labels,
        _fading,
        _fresh_network,
        _counted_twice,
        _normal,
        _fromp,
        _adapted,
        _memory_alone,
        _distilled,
        _sigmoids,
        _logits_kept,
        _scaled,
        _corrected,
        _frozen,
        _topology,
        _tested,
        _pictures,
        _sizes,
        _schedule,
        _lengths,
        _shards,
        _per_example,
        _learned_curvature,
        _grouped,
        _importance,
        _path,
        deepspeed,
        slurm,
    )
    return tuple(clash for rule in rules for clash in rule(config))


def _parts_of_scenario(config: RunConfig) -> Iterator[Clash]:
    """What a scenario asks of the data sets of a stream."""
    stream, key = config.stream, "stream.scenario.kind"
    kind, parts = stream.scenario.kind, () if isinstance(stream, DigitsStream) else stream.parts
    if kind == "domains":
        if len(parts) < 2:
            problem = "every part is a task, and there is one data set; set it to permuted or rotated"
            yield Clash((key, "stream.kind" if isinstance(stream, DigitsStream) else "stream.parts"), problem)
        if any(part.tasks > 1 for part in parts):
            yield Clash(("stream.parts", key), "has a part of several tasks, but every part is one; set tasks to 1")
        if len({part.classes for part in parts}) > 1:
            yield Clash(("stream.parts", key), "has parts of different `classes`; set the same for all")
    if kind in ("permuted", "rotated", "few_shot") and _several_parts(config):
        yield Clash(("stream.parts", key), f"has {len(parts)} data sets, but {kind} tasks are made of one; leave one")
    tasks = [stream.tasks] if isinstance(stream, DigitsStream) else [part.tasks for part in parts]
    if kind == "blurry" and 1 in tasks:
        problem = "mixes the tasks of a data set, and one has a single task; set tasks to 2 or more"
        yield Clash((key, "stream.tasks" if isinstance(stream, DigitsStream) else "stream.parts"), problem)
    if isinstance(stream.scenario, BlurryScenario) and stream.scenario.disjoint == 1:
        yield Clash(("stream.scenario.disjoint",), "leaves no class to be blurred; set it below 1, or kind to classes")


def _changed_images(config: RunConfig) -> Iterator[Clash]:
    """Of tasks that change all images, which are then decoded ones of one size."""
    scenario, data, cause = config.stream.scenario, config.data, "stream.scenario.kind"
    if not isinstance(scenario, PermutedScenario | RotatedScenario):
        return
    if data.storage == "encoded":
        yield Clash(("data.storage", cause), "tasks change decoded images; set it to auto or decoded")
    if isinstance(data.augment, TimmAugment):
        yield Clash(("data.augment.kind", cause), "tasks change decoded images; set it to none or crop_flip")
    if data.progressive is not None:
        yield Clash(("data.progressive", cause), "tasks change images of one size; leave it out")
    if data.test_size not in (None, data.image_size):
        yield Clash(("data.test_size", cause), "tasks change images of one size; leave it out")
    if isinstance(scenario, RotatedScenario) and scenario.angles == "even" and scenario.seed:
        yield Clash(("stream.scenario.seed", "stream.scenario.angles"), "even angles are not drawn; leave it 0")


def _several_parts(config: RunConfig) -> bool:
    return not isinstance(config.stream, DigitsStream) and len(config.stream.parts) > 1


def _few_shots(config: RunConfig) -> Iterator[Clash]:
    stream, scenario = config.stream, config.stream.scenario
    if not isinstance(scenario, FewShotScenario) or _several_parts(config):
        return
    if isinstance(stream, DigitsStream):
        tasks, cause, there, chosen = stream.tasks, "stream.tasks", 10, None
    else:
        tasks, cause, there, chosen = stream.parts[0].tasks, "stream.parts", None, stream.parts[0].classes
    if tasks < 2:
        yield Clash((cause, "stream.scenario.kind"), "is the base alone; add 1 for every session")
    if there is not None and scenario.base + scenario.way * (tasks - 1) > there:
        problem = (
            f"and {tasks - 1} sessions of {scenario.way} classes are more than {there} classes; set one of them lower"
        )
        yield Clash(("stream.scenario.base", "stream.scenario.way", "stream.tasks"), problem)
    if chosen is not None:
        problem = "has `classes`, which few_shot says by base + way * (tasks - 1); leave it out"
        yield Clash(("stream.parts", "stream.scenario.base"), problem)
    if scenario.lists is not None and scenario.seed:
        yield Clash(("stream.scenario.seed", "stream.scenario.lists"), "draws images, which lists name; leave it 0")


def _shared_classes(config: RunConfig) -> Iterator[Clash]:
    """What is said of new classes, where a task may have none."""
    scenario, prior, cause = config.stream.scenario, config.prior, "stream.scenario.kind"
    if not isinstance(scenario, DomainScenario | PermutedScenario | RotatedScenario | BlurryScenario):
        return
    why = f"is about new classes, and {scenario.kind} tasks share theirs"
    if config.train.head_epochs:
        yield Clash(("train.head_epochs", cause), f"{why}; leave it 0")
    if "old_classes" in config.train.frozen:
        yield Clash(("train.frozen", cause), f"{why}; leave old_classes out")
    if prior.distill.weight > 0 and prior.distill.balance == "classes":
        yield Clash(("prior.distill.balance", cause), f"{why}; set it to fixed")
    if prior.distill.weight > 0 and config.train.loss == "sigmoid":
        problem = f"leaves old classes to the old network, and {scenario.kind} tasks share theirs; use cross_entropy"
        yield Clash(("train.loss", cause), problem)
    if prior.correct.share > 0:
        yield Clash(("prior.correct.share", cause), f"{why}; set it to 0")
    if prior.topology.nodes > 0:
        yield Clash(("prior.topology.nodes", cause), f"{why}; set it to 0")
    if config.evaluate.classifier == "prototype":
        yield Clash(("evaluate.classifier", cause), f"{why}; set it to head")


def _budgets(memory: MemoryConfig) -> list[str]:
    """The keys that say how much is kept."""
    return [f"memory.{key}" for key in ("size", "total", "fraction") if getattr(memory, key) > 0]


def _one_budget(config: RunConfig) -> Iterator[Clash]:
    first, *others = _budgets(config.memory) or [""]
    if others:
        yield Clash((first, *others), "each of these says how much is kept; leave one, and set the others to 0")


def _selector(config: RunConfig) -> Iterator[Clash]:
    selector = config.memory.selector
    if not config.memory.kept or not isinstance(selector, ReconstructionSelector):
        return
    if selector.probes == 0 and config.prior.replay == 0:
        problem = "soft labels say nothing at the weights that end a task; set probes > 0, or prior.replay > 0"
        yield Clash(("memory.selector.probes", "prior.replay"), problem)


def _needs_memory(config: RunConfig) -> Iterator[Clash]:
    prior, usual = config.prior, PriorConfig()
    if config.memory.kept:
        return
    # scale_to_task and balanced only say how a memory would be used, and may stand in a file that all methods share,
    # as may the selector.
    ignored = [f"prior.{key}" for key in ("replay", "weight") if _differs(prior, usual, key)]
    if isinstance(config.memory.mix, StratifiedMix):
        ignored.append("memory.mix.kind")
    for key in ignored:
        yield Clash((key, "memory.size"), "needs a memory; set memory.size to the examples kept of each task")


def _copies(config: RunConfig) -> Iterator[Clash]:
    if not config.memory.kept or config.memory.keep == "reference":
        return
    if isinstance(config.stream, DigitsStream):
        problem = "the digits are a part of scikit-learn and cannot go missing; leave it reference"
        yield Clash(("memory.keep", "stream.kind"), problem)


def _differs(one: PriorConfig, other: PriorConfig, key: str) -> bool:
    return bool(getattr(one, key) != getattr(other, key))


def _needs_soft_labels(config: RunConfig) -> Iterator[Clash]:
    prior, usual = config.prior, PriorConfig()
    if config.memory.kept and prior.replay < 1:
        return
    empty = not config.memory.kept
    cause = ("memory.size",) if empty else ("prior.replay",)
    why = "there is no memory; set memory.size" if empty else "all of the memory has true labels; set prior.replay < 1"
    for key in ("temperature", "view"):
        if _differs(prior, usual, key):
            yield Clash((f"prior.{key}", *cause), f"is about soft labels, but {why}, or leave it {getattr(usual, key)}")


def _fading(config: RunConfig) -> Iterator[Clash]:
    """Of online EWC. Damping and anchor only say how a quadratic would be used, and may stand in a shared file."""
    quadratic = config.prior.quadratic
    if quadratic.weight == 0 and quadratic.decay < 1:
        problem = "there is no quadratic whose past could fade; set prior.quadratic.weight, or leave it 1"
        yield Clash(("prior.quadratic.decay", "prior.quadratic.weight"), problem)


def _fresh_network(config: RunConfig) -> Iterator[Clash]:
    train = config.train
    if not train.restart:
        if train.only_last:
            keys = ("train.only_last", "train.restart")
            yield Clash(keys, "skips earlier tasks, which changes nothing only with train.restart=true")
        return
    if train.only_last and train.data == "task":
        keys = ("train.only_last", "train.data")
        yield Clash(keys, "leaves the earlier tasks without a network of their own; set train.data=seen (joint)")
    past = [] if train.data == "memory" else _budgets(config.memory)
    if config.prior.quadratic.weight > 0:
        past.append("prior.quadratic.weight")
    past += ["prior.distill.weight"] if config.prior.distill.weight > 0 else []
    past += ["prior.topology.nodes"] if config.prior.topology.nodes > 0 else []
    past += [f"train.{key}" for key in ("head_epochs", "frozen") if getattr(train, key)]
    past += ["train.norms"] if train.norms == "running" else []
    if train.first_task_from is not None:
        past.append("train.first_task_from")
    for key in past:
        problem = "a network that restarts at every task has no past; unset it, or set train.restart=false"
        yield Clash((key, "train.restart"), problem)


def _counted_twice(config: RunConfig) -> Iterator[Clash]:
    if config.train.data != "seen" or config.train.restart:  # with restart: _fresh_network speaks
        return
    quadratic = ["prior.quadratic.weight"] if config.prior.quadratic.weight > 0 else []
    for key in (*_budgets(config.memory), *quadratic):
        yield Clash((key, "train.data"), "train.data=seen already trains on the past; unset one of the two")


def _normal(config: RunConfig) -> Iterator[Clash]:
    normal, key = config.prior.normal, "prior.normal.precision"
    if normal.precision == 0 and isinstance(config.adapt, NewPrecision) and config.adapt.precision > 0:
        key = "adapt.precision"
    elif normal.precision == 0:
        if normal.weight != NormalConfig().weight:
            yield Clash(("prior.normal.weight", key), "weighs a normal prior that there is not; set its precision > 0")
        return
    for name in ("weight_decay", "prior_precision"):  # every optimiser has one of them, or none
        if getattr(config.optim, name, 0) > 0:
            problem = f"pulls to 0 beside {key}, which says where to: set it to 0"
            yield Clash((f"optim.{name}", key), problem)
    if isinstance(config.adapt, NewPrecision) and normal.weight != 1:
        problem = "takes only a part of the old prior away, of which another takes the place; set it to 1"
        yield Clash(("prior.normal.weight", "adapt.kind"), problem)


def _fromp(config: RunConfig) -> Iterator[Clash]:
    prior, usual, key = config.prior, FrompConfig(), "prior.fromp.weight"
    fromp = prior.fromp
    if fromp.weight == 0:
        return
    if not config.memory.kept:
        yield Clash((key, "memory.size"), "needs a memory; set memory.size to the examples kept of each task")
    if prior.replay > 0:
        yield Clash(("prior.replay", key), "memory's predictions are kept as they are, not its labels; set it to 0")
    if prior.quadratic.weight > 0:
        problem = f"stands for the past, as does {key}: it would count twice; set one of them to 0"
        yield Clash(("prior.quadratic.weight", key), problem)
    if prior.normal.precision > 0:
        problem = f"after the first task it stands for the past, as does {key}; set one of them to 0"
        yield Clash(("prior.normal.precision", key), problem)
    for name in ("weight", "temperature", "view", "loss", "label_weight", "scale_to_task", "scale_to_new"):
        if _differs(prior, PriorConfig(), name):
            problem = f"is about rows of memory, of which {key} makes none; leave it out"
            yield Clash((f"prior.{name}", key), problem)
    if isinstance(config.memory.mix, StratifiedMix):
        yield Clash(
            ("memory.mix.kind", key), "mixes rows of memory, but it is recalled beside a step's rows; set natural"
        )
    if config.memory.total > 0:
        problem = "examples would leave memory whose predictions are coupled; set memory.size or memory.fraction"
        yield Clash(("memory.total", key), problem)
    if config.log.reconstruction > 0:
        problem = "compares gradients of soft labels, replay and quadratic, which are not there; set it to 0"
        yield Clash(("log.reconstruction", key), problem)
    if fromp.kernel == "posterior" and isinstance(config.curvature, (MasCurvature, SiCurvature)):
        problem = "is no Fisher matrix, of which the posterior's kernel is made; set another kind, or kernel=identity"
        yield Clash(("curvature.kind", "prior.fromp.kernel"), problem)
    if fromp.kernel == "posterior" and isinstance(config.curvature, OptimizerCurvature):
        problem = "is learned without passes, and the posterior's kernel is made of measured ones; set it to diagonal"
        yield Clash(("curvature.kind", "prior.fromp.kernel"), problem)
    if fromp.kernel == "identity":
        for name in ("precision", "jitter"):
            if getattr(fromp, name) != getattr(usual, name):
                yield Clash((f"prior.fromp.{name}", "prior.fromp.kernel"), "is of the posterior's kernel; leave it out")


def _adapted(config: RunConfig) -> Iterator[Clash]:
    """Of what `hpccl adapt` writes, and of settings that are put over it."""
    adapt = config.adapt
    if not isinstance(adapt, AnyAdaptation):
        return
    if config.train.restart or config.train.only_last or config.train.first_task_from is not None:
        yield Clash(("train.restart", "adapt.kind"), "an adaptation is one task; leave restart, only_last and the like")
    if (config.train.data == "seen") != adapt.retrain:
        problem = "the reference trains on all data, an adaptation on what is new; leave it as hpccl adapt set it"
        yield Clash(("train.data", "adapt.retrain"), problem)
    if config.log.reconstruction > 0:
        problem = "compares with the gradient of earlier tasks, and an adaptation has none; set it to 0"
        yield Clash(("log.reconstruction", "adapt.kind"), problem)
    if config.train.loss == "sigmoid":
        problem = (
            "soft labels and what is taken back of them are a softmax's; adapt a run with train.loss=cross_entropy"
        )
        yield Clash(("train.loss", "adapt.kind"), problem)
    if config.train.head_epochs > 0:
        yield Clash(("train.head_epochs", "adapt.kind"), "is for new classes' rows, and there are none; set it to 0")
    if config.evaluate.classifier != "head":
        yield Clash(
            ("evaluate.classifier", "adapt.kind"), "is made of a task's end, which is not there; set it to head"
        )
    if "old_classes" in config.train.frozen:
        problem = "leaves only new classes' rows to learn, and there are none; leave old_classes out"
        yield Clash(("train.frozen", "adapt.kind"), problem)
    scenario = config.stream.scenario
    if isinstance(adapt, AddData) and isinstance(scenario, PermutedScenario | RotatedScenario | BlurryScenario):
        problem = f"{scenario.kind} tasks change or mix images, and added ones are of no task; adapt a run of others"
        yield Clash(("stream.scenario.kind", "adapt.kind"), problem)
    if adapt.retrain:
        return
    usual = PriorConfig()
    for name in ("loss", "label_weight", "scale_to_new", "distill", "correct"):
        if _differs(config.prior, usual, name):
            key = f"prior.{name}" + {"distill": ".weight", "correct": ".share"}.get(name, "")
            problem = "says of the past what an adaptation does not; adapt a run of soft labels, replay or a quadratic"
            yield Clash((key, "adapt.kind"), problem)
    if config.memory.labels == "kept":
        problem = "keeps what older networks said, and adapting asks what the last one did; adapt a run that relabels"
        yield Clash(("memory.labels", "adapt.kind"), problem)
    if config.prior.fromp.weight > 0:
        problem = "couples predictions on memory, of which adaptation takes soft labels; adapt a run with soft labels"
        yield Clash(("prior.fromp.weight", "adapt.kind"), problem)
    if config.prior.topology.nodes > 0:
        problem = "keeps features in place while new classes are learned, and there are none; set it to 0"
        yield Clash(("prior.topology.nodes", "adapt.kind"), problem)
    if config.prior.replay == 1 and isinstance(adapt, NewModel):
        problem = "the old network says nothing where all of the memory has true labels; adapt a run with soft labels"
        yield Clash(("prior.replay", "adapt.kind"), problem)
    if config.prior.view == "teacher" and isinstance(adapt, NewModel):
        problem = "asks the old network, which is of another kind; set it to stored or recorded"
        yield Clash(("prior.view", "adapt.kind"), problem)
    if config.prior.quadratic.weight > 0 and isinstance(adapt, NewModel):
        problem = "is about the weights of the old network; set it to 0"
        yield Clash(("prior.quadratic.weight", "adapt.kind"), problem)


def _memory_alone(config: RunConfig) -> Iterator[Clash]:
    """Of train.data=memory, and of the selectors that can choose before there is a network."""
    train, memory = config.train, config.memory
    if train.data != "memory":
        return
    if not train.restart:
        problem = "trains on the memory alone, which holds the past already; set train.restart=true"
        yield Clash(("train.data", "train.restart"), problem)
    if train.only_last:
        yield Clash(("train.only_last", "train.data"), "skips tasks whose examples the memory is made of")
    if not memory.kept:
        yield Clash(("train.data", "memory.total"), "needs a memory; set memory.total to the examples kept in all")
        return
    if memory.selector.kind not in ("uniform", "reservoir", "greedy"):
        problem = (
            "looks at a network, but the memory is chosen before one is trained; allowed: uniform, reservoir, greedy"
        )
        yield Clash(("memory.selector.kind", "train.data"), problem)
    if isinstance(memory.mix, StratifiedMix):
        yield Clash(("memory.mix.kind", "train.data"), "mixes memory with new data, of which there are none")
    if config.prior.replay < 1:
        yield Clash(("prior.replay", "train.data"), "all of memory is learned by its true labels; set prior.replay=1")
    if _differs(config.prior, PriorConfig(), "weight"):
        problem = "weighs memory against new data, of which there are none; leave it 1"
        yield Clash(("prior.weight", "train.data"), problem)


def _distilled(config: RunConfig) -> Iterator[Clash]:
    distill, usual, prior = config.prior.distill, DistillConfig(), config.prior
    if distill.weight == 0:
        return
    if config.train.data == "seen" and not config.train.restart:
        yield Clash(("prior.distill.weight", "train.data"), "train.data=seen already trains on the past; unset one")
    if distill.images == "all" and not config.memory.kept:
        yield Clash(("prior.distill.images", "memory.size"), "is about memory's images, but there is no memory")
    elif distill.images == "all" and prior.replay < 1:
        problem = "memory's soft labels say the same already; set prior.replay=1, or leave it new"
        yield Clash(("prior.distill.images", "prior.replay"), problem)
    if distill.balance == "classes" and config.train.head == "own":
        problem = "weighs old classes against new ones, which do not compete; set train.head=seen, or leave it fixed"
        yield Clash(("prior.distill.balance", "train.head"), problem)
    if distill.scale_t2 and distill.temperature == 1:
        yield Clash(("prior.distill.scale_t2", "prior.distill.temperature"), f"1^2 is 1; {usual.temperature} is usual")


def _sigmoids(config: RunConfig) -> Iterator[Clash]:
    train, prior = config.train, config.prior
    if train.loss != "sigmoid":
        return
    because = "train.loss=sigmoid has no softmax"
    if prior.quadratic.weight > 0:
        yield Clash(("prior.quadratic.weight", "train.loss"), f"curvature is that of a softmax, and {because}")
    if config.memory.kept and prior.replay < 1:
        yield Clash(("prior.replay", "train.loss"), f"soft labels are a softmax's, and {because}; set prior.replay=1")
    if train.label_smoothing > 0:
        yield Clash(("train.label_smoothing", "train.loss"), f"spreads a label over a softmax, and {because}")
    if prior.distill.weight > 0:
        if train.head == "own":
            problem = "the old network answers for the old classes of every image; set train.head=seen"
            yield Clash(("train.head", "train.loss"), problem)
        if config.memory.kept and prior.distill.images == "new":
            problem = "nothing would be said of the old classes of memory's images; set it to all"
            yield Clash(("prior.distill.images", "train.loss"), problem)
        if config.memory.dtype != "fp32" and prior.distill.view == "recorded":
            problem = "keeps differences of logits, of which a softmax is made, but not a sigmoid; set it to fp32"
            yield Clash(("memory.dtype", "train.loss"), problem)


def _logits_kept(config: RunConfig) -> Iterator[Clash]:
    """Of what is said of memory by logits (DER) and by two rows (DER++)."""
    prior, usual = config.prior, PriorConfig()
    soft = config.memory.kept and prior.replay < 1
    if not soft:
        keys = [f"prior.{key}" for key in ("loss", "label_weight") if _differs(prior, usual, key)]
        keys += ["memory.labels"] if config.memory.labels == "kept" else []
        for key in keys:
            yield Clash((key, "prior.replay"), "is about soft-labelled memory, and there is none; set prior.replay < 1")
        return
    if config.memory.labels == "kept" and prior.view == "teacher":
        problem = "asks the newest network; with kept labels, set it to stored or recorded"
        yield Clash(("prior.view", "memory.labels"), problem)
    if prior.label_weight > 0 and prior.replay > 0:
        problem = "every example speaks by its soft and its true label already; set prior.replay=0"
        yield Clash(("prior.replay", "prior.label_weight"), problem)
    if prior.loss == "squared":
        if prior.temperature != 1:
            yield Clash(
                ("prior.temperature", "prior.loss"), "squared differences are of logits as they are; set it to 1"
            )
        if config.memory.dtype != "fp32":
            problem = "keeps differences of logits only; squared differences need the logits: set it to fp32"
            yield Clash(("memory.dtype", "prior.loss"), problem)


def _scaled(config: RunConfig) -> Iterator[Clash]:
    if not config.prior.scale_to_new:
        return
    if config.prior.scale_to_task:
        yield Clash(("prior.scale_to_new", "prior.scale_to_task"), "both say what memory stands for; unset one")
    if not config.memory.kept:
        yield Clash(("prior.scale_to_new", "memory.size"), "needs a memory; set memory.size, or memory.total")


def _corrected(config: RunConfig) -> Iterator[Clash]:
    memory, prior = config.memory, config.prior
    if prior.correct.share == 0:
        return
    key = "prior.correct.share"
    if memory.total == 0:
        yield Clash((key, "memory.total"), "is a share of memory.total, which is 0; set it to the examples kept in all")
    if not memory.balanced:
        yield Clash(
            ("memory.balanced", key), "held-out and kept examples are equally many of each class; set it to true"
        )
    if isinstance(memory.selector, GreedySelector) or memory.selector.kind == "reservoir":
        problem = "keeps what it chooses from the whole past, without a part that is held out; choose another selector"
        yield Clash(("memory.selector.kind", key), problem)
    if config.train.head == "own":
        yield Clash(("train.head", key), "corrects new classes against old ones, which do not compete; set it to seen")
    if config.train.data != "task" or config.train.restart:
        yield Clash(("train.data", key), "holds examples out of a task; set train.data=task and train.restart=false")
    if config.evaluate.classifier != "head":
        yield Clash(("evaluate.classifier", key), "corrects logits, which nearest means do not have; set it to head")
    if prior.quadratic.weight > 0:
        problem = "curvature would be measured on held-out examples, too; set it to 0"
        yield Clash(("prior.quadratic.weight", key), problem)


def _frozen(config: RunConfig) -> Iterator[Clash]:
    train = config.train
    if "features" in train.frozen and train.head_epochs > 0:
        problem = "the last layer learns alone all the time; leave it 0, and set train.epochs"
        yield Clash(("train.head_epochs", "train.frozen"), problem)


def _topology(config: RunConfig) -> Iterator[Clash]:
    topology, train = config.prior.topology, config.train
    if topology.nodes == 0:
        return
    key = "prior.topology.nodes"
    if train.data != "task" and not train.restart:  # with restart: _fresh_network speaks
        yield Clash((key, "train.data"), "keeps the past in place while a task is learned; set train.data=task")
    if topology.anchor == 0 and topology.minmax == 0:
        yield Clash(
            (key, "prior.topology.anchor"), "says nothing without anchor and minmax; set one above 0, or this to 0"
        )
    if getattr(config.engine, "compile", False):
        problem = "looks into the network in every step, which compiled code does not show; set engine.compile=false"
        yield Clash((key, "engine.compile"), problem)
    if "features" in train.frozen:
        yield Clash((key, "train.frozen"), "moves features, which are frozen; leave it 0")
    if train.head_epochs:
        yield Clash((key, "train.head_epochs"), "moves features, which stay at first; set train.head_epochs=0")


def _tested(config: RunConfig) -> Iterator[Clash]:
    if config.evaluate.classifier == "nearest_mean" and not config.memory.kept:
        problem = "means are of memory's examples; set memory.size or memory.total"
        yield Clash(("evaluate.classifier", "memory.size"), problem)
    if config.evaluate.classifier == "prototype" and config.train.restart:
        problem = "keeps the prototypes of classes from task to task; set train.restart=false"
        yield Clash(("evaluate.classifier", "train.restart"), problem)


def _pictures(config: RunConfig) -> Iterator[Clash]:
    data, usual = config.data, DataConfig()
    if data.image_size is None:
        problem = "needs data.image_size: the size that images are brought to"
        if isinstance(data.augment, TimmAugment):
            yield Clash(("data.augment.kind", "data.image_size"), problem)
        if data.crop_pct != usual.crop_pct:
            yield Clash(("data.crop_pct", "data.image_size"), problem)
    if any(value <= 0 for value in data.std):
        yield Clash(("data.std",), "every standard deviation must be > 0")
    if len({len(data.mean), len(data.std)} - {1}) > 1:
        yield Clash(("data.mean", "data.std"), f"has {len(data.mean)} numbers and data.std has {len(data.std)}")
    if isinstance(data.augment, TimmAugment):
        for key in ("scale", "ratio"):
            values = getattr(data.augment, key)
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                yield Clash((f"data.augment.{key}",), "must be [smallest, largest], both > 0")


def _sizes(config: RunConfig) -> Iterator[Clash]:
    """Of training and test images: what one size cannot be, and which networks take several."""
    data, grows = config.data, config.data.progressive
    if data.image_size is None:
        for key in ("test_size", "progressive"):
            if getattr(data, key) is not None:
                yield Clash((f"data.{key}", "data.image_size"), "needs data.image_size: the side of training images")
        return
    several = ["data.test_size"] if data.test_size not in (None, data.image_size) else []
    if grows is not None:
        several.append("data.progressive")
        if grows.first > data.image_size:
            yield Clash(("data.progressive.first", "data.image_size"), f"is above {data.image_size}; views only grow")
        if grows.begin > grows.end:
            yield Clash(("data.progressive.begin", "data.progressive.end"), f"is above {grows.end}; views only grow")
        if data.storage == "decoded" or isinstance(config.stream, DigitsStream):
            cause = "stream.kind" if isinstance(config.stream, DigitsStream) else "data.storage"
            yield Clash(
                ("data.progressive", cause), "needs the full images; use shards, and data.storage=auto or encoded"
            )
    model = config.model
    if (
        isinstance(model, TimmModel)
        and _SIZED.fullmatch(model.name)
        and not model.options.get("dynamic_img_size", False)
    ):
        for key in several:
            problem = f"gives images of several sizes, and {model.name} takes one; add dynamic_img_size: true"
            yield Clash((key, "model.options"), problem)
    if config.model.kind != "timm":
        for key in several:
            problem = f"gives images of several sizes, but {config.model.kind} is built for one; use a model of timm"
            yield Clash((key, "model.kind"), problem)


def _schedule(config: RunConfig) -> Iterator[Clash]:
    optim, train = config.optim, config.train
    if optim.schedule == "constant" and optim.final_lr != 0:
        keys = ("optim.final_lr", "optim.schedule")
        yield Clash(keys, "a constant schedule has no last learning rate; set optim.schedule=cosine, or leave it 0")
    if train.accumulate > train.batch_size:
        keys = ("train.accumulate", "train.batch_size")
        yield Clash(keys, f"cuts a batch of {train.batch_size} rows into more pieces than it has rows")
    curvature = config.curvature
    if isinstance(curvature, KroneckerCurvature) and curvature.keep_trace < 1 and curvature.tasks.kind == "refit":
        keys = ("curvature.keep_trace", "curvature.tasks.kind")
        yield Clash(keys, "eigenbases are whole and cannot be of low rank; leave it 1, or sum tasks in another way")
    if isinstance(curvature, Measured) and curvature.samples != 1 and curvature.fisher != "mc":
        keys = ("curvature.samples", "curvature.fisher")
        yield Clash(keys, "labels are drawn only with curvature.fisher=mc")


def _lengths(config: RunConfig) -> Iterator[Clash]:
    if isinstance(config.stream, DigitsStream):
        tasks, keys = config.stream.tasks, ("stream.tasks",)
    else:
        tasks, keys = sum(part.tasks for part in config.stream.parts), ("stream.parts",)
    for key, values in (
        ("train.epochs", config.train.epochs),
        ("optim.lr", config.optim.lr),
        ("prior.weight", config.prior.weight),
    ):
        if len(values) > max(tasks, 1):
            yield Clash((key, *keys), f"has {len(values)} values, but the stream has {tasks} tasks")


def _shards(config: RunConfig) -> Iterator[Clash]:
    engine = config.engine
    if isinstance(engine, DdpEngine) or (isinstance(engine, DeepspeedEngine) and engine.stage == 0):
        return
    if isinstance(config.optim, TimmOptim) and config.optim.name.lower() not in _ELEMENTWISE:
        known = ", ".join(sorted(_ELEMENTWISE))
        problem = f"looks at whole tensors, and this engine has its state in shards; allowed here: {known}"
        yield Clash(("optim.name", "engine.kind"), problem)
    if isinstance(config.optim, TimmOptim) and config.optim.options.get("caution"):
        problem = "takes a mean over whole tensors, and this engine has them in shards; leave it out, or use ddp"
        yield Clash(("optim.options.caution", "engine.kind"), problem)
    if engine.kind == "fsdp2" and engine.compile and engine.recompute:
        yield Clash(("engine.recompute", "engine.compile"), "blocks are compiled one by one; set one of the two")


def _per_example(config: RunConfig) -> Iterator[Clash]:
    """Of VOGN, whose squares are made layer by layer while whole weights are in place."""
    if not isinstance(config.optim, VognOptim):
        return
    if not isinstance(config.engine, DeepspeedEngine) and config.engine.compile:
        problem = "compiled code does not show what comes into a layer; set it to false, or use optim.kind=ivon"
        yield Clash(("engine.compile", "optim.kind"), problem)
    if config.engine.recompute:
        problem = "calls layers twice in a pass, whose inputs count once; set it to false, or use optim.kind=ivon"
        yield Clash(("engine.recompute", "optim.kind"), problem)
    for key, used in (
        ("prior.fromp.weight", config.prior.fromp.weight > 0),
        ("prior.topology.nodes", config.prior.topology.nodes > 0),
    ):
        if used:
            problem = "couples examples, whose squared gradients then are no sum of their own; use optim.kind=ivon"
            yield Clash((key, "optim.kind"), problem)


def _learned_curvature(config: RunConfig) -> Iterator[Clash]:
    """Of a curvature that no pass measures."""
    curvature, optim, usual = config.curvature, config.optim, Measured()
    if not isinstance(curvature, OptimizerCurvature):
        return
    for key in ("fisher", "samples", "fraction"):
        if getattr(curvature, key) != getattr(usual, key):
            yield Clash((f"curvature.{key}", "curvature.kind"), "is about a pass over the task, and there is none")
    if config.prior.quadratic.weight == 0:
        return
    timm = isinstance(optim, TimmOptim)
    if not (optim.name.lower() in LEARNING_SQUARES if isinstance(optim, TimmOptim) else optim.kind in _LEARNING):
        problem = (
            f"this optimiser learns no curvature; allowed: optim.kind={', '.join(_LEARNING)}, or optim.name="
            f"{', '.join(LEARNING_SQUARES)}; or curvature.kind=diagonal"
        )
        yield Clash(("curvature.kind", "optim.name" if timm else "optim.kind"), problem)
    if config.train.first_task_from is not None:
        problem = "the optimiser that learned the first task's curvature is in another run; use curvature.kind=diagonal"
        yield Clash(("train.first_task_from", "curvature.kind"), problem)
    for key in _budgets(config.memory):
        problem = "the optimiser learns from the memory's examples too, which the quadratic must not count; set it to 0"
        yield Clash((key, "curvature.kind"), f"{problem}, or use curvature.kind=diagonal")
    for key, used, what in (
        ("prior.distill.weight", config.prior.distill.weight > 0, "what the old network says"),
        ("prior.normal.precision", config.prior.normal.precision > 0, "the normal prior"),
        ("prior.topology.nodes", config.prior.topology.nodes > 0, "the nodes"),
    ):
        if used:
            problem = f"the optimiser learns from {what}, too, which the quadratic must not count"
            yield Clash((key, "curvature.kind"), f"{problem}; use curvature.kind=diagonal")


def _grouped(config: RunConfig) -> Iterator[Clash]:
    """Of gradients that are averaged over examples before they are squared or made absolute."""
    curvature, engine, key = config.curvature, config.engine, "curvature.group"
    if not isinstance(curvature, (DiagonalCurvature, MasCurvature)) or curvature.group == 1 or not config.measures:
        return
    if isinstance(curvature, DiagonalCurvature) and curvature.fisher != "empirical":
        problem = f"averages gradients of true labels, and {curvature.fisher} takes others; set it to empirical"
        yield Clash(("curvature.fisher", key), problem)
    if isinstance(curvature, MasCurvature) and curvature.variant == "local":
        yield Clash((key, "curvature.variant"), "is of gradients of the network's output; leave it 1, or set global")
    if config.prior.fromp.weight > 0:
        problem = "makes something else of the Fisher matrix, of which the posterior's kernel is made; leave it 1"
        yield Clash((key, "prior.fromp.kernel"), problem)
    if isinstance(config.memory.selector, ReconstructionSelector):
        problem = "leaves out what a quadratic of the loss says, which this is not one; leave group 1"
        yield Clash(("memory.selector.kind", key), problem)
    if engine.kind == "fsdp2" or (isinstance(engine, DeepspeedEngine) and engine.stage == 3):
        problem = "needs whole gradients while it measures, and this engine has them in shards; leave it 1, or use ddp"
        yield Clash((key, "engine.kind"), problem)


def _importance(config: RunConfig) -> Iterator[Clash]:
    """Of curvatures that are not those of the loss."""
    if not isinstance(config.curvature, (MasCurvature, SiCurvature)) or config.prior.quadratic.weight == 0:
        return
    if isinstance(config.memory.selector, ReconstructionSelector):
        problem = "leaves out what a quadratic of the loss says, which an importance does not; use another selector"
        yield Clash(("memory.selector.kind", "curvature.kind"), problem)


def _path(config: RunConfig) -> Iterator[Clash]:
    """Of what must be so that each step of a task counts, from its first weights to its last."""
    train = config.train
    if not isinstance(config.curvature, SiCurvature):
        return
    if config.curvature.fraction != 1:
        yield Clash(("curvature.fraction", "curvature.kind"), "si makes no pass over examples; leave it 1")
    if not config.follows:
        return
    if config.prior.normal.precision > 0:
        problem = "pulls at the weights beside the loss, which si would count as the loss's; set it to 0"
        yield Clash(("prior.normal.precision", "curvature.kind"), problem)
    if not isinstance(config.optim, TimmOptim):
        problem = "takes gradients at other weights than those it moves, and si needs both at one place; use timm"
        yield Clash(("optim.kind", "curvature.kind"), problem)
    if train.ema is not None:
        problem = "ends a task at other weights than those its path led to, which si needs; leave it null"
        yield Clash(("train.ema", "curvature.kind"), problem)
    if train.first_task_from is not None:
        problem = "leaves the first task without a path, which si needs; leave it null"
        yield Clash(("train.first_task_from", "curvature.kind"), problem)
    if train.head_epochs > 0:
        problem = "begins a second path within a task, and si follows one; set it to 0"
        yield Clash(("train.head_epochs", "curvature.kind"), problem)
