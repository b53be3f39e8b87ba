"""What methods require of each other: terms of the loss, what is trained, how it is tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.adaptation import NewPrecision, NoAdaptation
from hpccl.config.clash import Clash
from hpccl.config.curvature import MasCurvature, OptimizerCurvature, SiCurvature
from hpccl.config.memory import (
    GreedySelector,
    PosteriorSelector,
    ReconstructionSelector,
    ScoreSelector,
    StratifiedMix,
)
from hpccl.config.prior import DistillConfig, FrompConfig, NormalConfig, PriorConfig
from hpccl.config.rules.common import budgets, differs

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]


def _fresh_network(config: RunConfig) -> Iterator[Clash]:
    train = config.train
    if not train.restart:
        if train.only_last:
            keys = ("train.only_last", "train.restart")
            yield Clash(keys, "skips earlier tasks, which are needed unless train.restart=true; leave it false")
        return
    if train.only_last and train.data == "task":
        keys = ("train.only_last", "train.data")
        yield Clash(
            keys,
            "leaves the earlier tasks without a network of their own; set train.data=seen (joint) or memory (GDumb)",
        )
    past = [] if train.data == "memory" else budgets(config.memory)
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
    if config.train.data != "seen" or config.train.restart:  # with restart: reported by _fresh_network
        return
    quadratic = ["prior.quadratic.weight"] if config.prior.quadratic.weight > 0 else []
    for key in (*budgets(config.memory), *quadratic):
        yield Clash((key, "train.data"), "train.data=seen already trains on the past; unset one of the two")


def _normal(config: RunConfig) -> Iterator[Clash]:
    normal, key = config.prior.normal, "prior.normal.precision"
    if normal.precision == 0 and isinstance(config.adapt, NewPrecision) and config.adapt.precision > 0:
        key = "adapt.precision"
    elif normal.precision == 0:
        if normal.weight != NormalConfig().weight:
            problem = "scales the normal prior, but there is none; set prior.normal.precision > 0"
            yield Clash(("prior.normal.weight", key), problem)
        return
    fresh = config.train.data == "seen" or config.train.restart
    if fresh and isinstance(config.adapt, NoAdaptation) and normal.weight != NormalConfig().weight:
        problem = "scales the pull to old weights, but this prior stays around 0; set it to 1"
        yield Clash(("prior.normal.weight", "train.restart" if config.train.restart else "train.data"), problem)
    for name in ("weight_decay", "prior_precision"):  # every optimiser has one of them, or none
        if getattr(config.optim, name, 0) > 0:
            problem = f"would pull the weights to 0 in addition to {key}; set it to 0"
            yield Clash((f"optim.{name}", key), problem)
    if isinstance(config.adapt, NewPrecision) and normal.weight != 1:
        problem = "would remove only a part of the old prior before the new one is added; set it to 1"
        yield Clash(("prior.normal.weight", "adapt.kind"), problem)
    if config.prior.distill.weight > 0 and isinstance(config.adapt, NoAdaptation):
        problem = f"changes what labels say of the past, which {key} counts on; set one of the two to 0"
        yield Clash(("prior.distill.weight", key), problem)
    if config.memory.kept and config.prior.some_soft and isinstance(config.adapt, NoAdaptation):
        because = f"the pull of {key} is to the newest old weights"
        if config.memory.labels == "kept":
            yield Clash(("memory.labels", key), f"{because}, so soft labels must be theirs; set it to renewed")
        if config.prior.loss == "squared":
            yield Clash(("prior.loss", key), f"{because}, as follows from cross-entropy; set it to cross_entropy")


_OF_SOFTMAX = (ScoreSelector, PosteriorSelector, ReconstructionSelector)
_NEVER_COMPETE = "old classes do not compete with new ones there; leave it seen"


def _fromp(config: RunConfig) -> Iterator[Clash]:
    prior, usual, key = config.prior, FrompConfig(), "prior.fromp.weight"
    fromp = prior.fromp
    if fromp.weight == 0:
        return
    if not config.memory.kept:
        yield Clash((key, "memory.size"), "needs a memory; set memory.size to the examples kept of each task")
    if prior.some_true:
        yield Clash(("prior.replay", key), "FROMP keeps predictions on memory, not its labels; set it to 0")
    if prior.quadratic.weight > 0:
        problem = f"represents the past, as {key} does, which would count twice; set one of them to 0"
        yield Clash(("prior.quadratic.weight", key), problem)
    if prior.normal.precision > 0:
        problem = f"represents the past after the first task, as {key} does; set one of them to 0"
        yield Clash(("prior.normal.precision", key), problem)
    for name in ("weight", "temperature", "view", "loss", "label_weight", "scale_to_task", "scale_to_new"):
        if differs(prior, PriorConfig(), name):
            problem = f"is about rows of memory, but {key} makes none; leave it out"
            yield Clash((f"prior.{name}", key), problem)
    if prior.classes == "known" and config.train.head == "own":
        yield Clash(("prior.classes", "train.head"), _NEVER_COMPETE)
    if config.memory.labels == "kept":
        yield Clash(("memory.labels", key), "FROMP renews its predictions after every task; set renewed")
    if isinstance(config.memory.mix, StratifiedMix):
        yield Clash(
            ("memory.mix.kind", key), "mixes memory into a step's rows, but FROMP recalls it beside them; set natural"
        )
    if getattr(config.memory.selector, "sampled", False):
        problem = "weights the drawn examples, but coupled predictions have no weights; set it to false"
        yield Clash(("memory.selector.sampled", key), problem)
    if getattr(config.memory.selector, "weights", "equal") == "fitted":
        problem = "fits weights of the examples, but coupled predictions have none; set it to equal"
        yield Clash(("memory.selector.weights", key), problem)
    if config.memory.total > 0:
        problem = "drops examples whose predictions are coupled; use memory.size or memory.fraction instead"
        yield Clash(("memory.total", key), problem)
    if config.log.reconstruction > 0:
        problem = "compares gradients of soft labels, replay and a quadratic, but FROMP replaces these; set it to 0"
        yield Clash(("log.reconstruction", key), problem)
    if fromp.kernel == "posterior" and isinstance(config.curvature, (MasCurvature, SiCurvature)):
        problem = "gives no Fisher matrix, which the posterior's kernel needs; use another kind, or kernel=identity"
        yield Clash(("curvature.kind", "prior.fromp.kernel"), problem)
    if fromp.kernel == "posterior" and isinstance(config.curvature, OptimizerCurvature):
        problem = "is learned without passes, but the posterior's kernel needs a measured one; set it to diagonal"
        yield Clash(("curvature.kind", "prior.fromp.kernel"), problem)
    if fromp.kernel == "identity":
        for name in ("precision", "jitter"):
            if getattr(fromp, name) != getattr(usual, name):
                yield Clash(
                    (f"prior.fromp.{name}", "prior.fromp.kernel"), "applies to kernel=posterior only; leave it out"
                )


def _memory_alone(config: RunConfig) -> Iterator[Clash]:
    """Clashes of train.data=memory, with which memory is chosen before there is a network."""
    train, memory = config.train, config.memory
    if train.data != "memory":
        return
    if not train.restart:
        problem = "trains on the memory alone, which already holds the past; set train.restart=true"
        yield Clash(("train.data", "train.restart"), problem)
    if not memory.kept:
        yield Clash(
            ("train.data", "memory.total"), "needs a memory; set memory.total to the number of examples to keep"
        )
        return
    if memory.selector.kind not in ("uniform", "reservoir", "greedy"):
        problem = "needs a trained network, but the memory is chosen before one; allowed: uniform, reservoir, greedy"
        yield Clash(("memory.selector.kind", "train.data"), problem)
    if isinstance(memory.mix, StratifiedMix):
        yield Clash(("memory.mix.kind", "train.data"), "mixes memory with new data, but there is none; set natural")
    if config.prior.some_soft:
        yield Clash(("prior.replay", "train.data"), "memory is learned with its true labels; set it to 1")
    if differs(config.prior, PriorConfig(), "weight"):
        problem = "weights memory against new data, but there is none; leave it 1"
        yield Clash(("prior.weight", "train.data"), problem)
    if config.prior.scale_to_new:
        problem = "weights memory by the amount of new data, but there is none; leave it false"
        yield Clash(("prior.scale_to_new", "train.data"), problem)


def _distilled(config: RunConfig) -> Iterator[Clash]:
    distill, usual, prior = config.prior.distill, DistillConfig(), config.prior
    if distill.weight == 0:
        return
    if config.train.data == "seen" and not config.train.restart:
        yield Clash(
            ("prior.distill.weight", "train.data"), "train.data=seen already trains on the past; unset one of the two"
        )
    if distill.images == "all" and not config.memory.kept:
        yield Clash(
            ("prior.distill.images", "memory.size"), "is about memory's images, but there is no memory; leave it new"
        )
    elif distill.images == "all" and prior.some_soft:
        problem = "memory's soft labels already do the same; set prior.replay=1, or leave it new"
        yield Clash(("prior.distill.images", "prior.replay"), problem)
    if distill.balance == "classes" and config.train.head == "own":
        problem = "weights old classes against new ones, which do not compete; set train.head=seen, or leave it fixed"
        yield Clash(("prior.distill.balance", "train.head"), problem)
    if distill.scale_t2 and distill.temperature == 1:
        yield Clash(
            ("prior.distill.scale_t2", "prior.distill.temperature"),
            f"has no effect at temperature 1; leave it false, or use {usual.temperature}",
        )


def _sigmoids(config: RunConfig) -> Iterator[Clash]:
    train, prior = config.train, config.prior
    if train.loss != "sigmoid":
        return
    because = "train.loss=sigmoid has no softmax"
    if prior.quadratic.weight > 0:
        yield Clash(
            ("prior.quadratic.weight", "train.loss"), f"curvature is that of a softmax, but {because}; set it to 0"
        )
    if config.memory.kept and prior.some_soft:
        yield Clash(("prior.replay", "train.loss"), f"soft labels are those of a softmax, but {because}; set it to 1")
    if config.memory.kept and isinstance(config.memory.selector, _OF_SOFTMAX):
        problem = f"scores examples by probabilities of a softmax, but {because}; choose another selector"
        yield Clash(("memory.selector.kind", "train.loss"), problem)
    if train.label_smoothing > 0:
        yield Clash(
            ("train.label_smoothing", "train.loss"), f"spreads a label over a softmax, but {because}; set it to 0"
        )
    if prior.correct.share > 0:
        problem = (
            f"is fitted to differences of logits, but {because}, and sigmoids change with all of them; set it to 0"
        )
        yield Clash(("prior.correct.share", "train.loss"), problem)
    if prior.distill.weight > 0:
        if train.head == "own":
            problem = "distillation sets the targets of all old classes for every image; set train.head=seen"
            yield Clash(("train.head", "train.loss"), problem)
        if config.memory.kept and prior.distill.images == "new":
            problem = "memory's images would have no targets for old classes; set it to all"
            yield Clash(("prior.distill.images", "train.loss"), problem)
        if config.memory.dtype != "fp32" and prior.distill.view == "recorded":
            problem = "stores differences of logits, which suffice for a softmax but not for a sigmoid; set it to fp32"
            yield Clash(("memory.dtype", "train.loss"), problem)


def _logits_kept(config: RunConfig) -> Iterator[Clash]:
    """Clashes of squared differences of logits (DER), of kept logits, and of two rows per example (DER++)."""
    prior, usual = config.prior, PriorConfig()
    soft = config.memory.kept and prior.some_soft
    if not soft:
        keys = [f"prior.{key}" for key in ("loss", "label_weight") if differs(prior, usual, key)]
        keys += ["memory.labels"] if config.memory.labels == "kept" else []
        other, remedy = ("prior.replay", "prior.replay < 1") if config.memory.kept else ("memory.size", "memory.size")
        for key in keys:
            yield Clash((key, other), f"is about soft-labelled memory, but there is none; set {remedy}")
        return
    if config.memory.labels == "kept" and prior.view == "teacher":
        problem = "uses labels of the newest network; with kept labels, set it to stored or recorded"
        yield Clash(("prior.view", "memory.labels"), problem)
    if prior.label_weight > 0 and prior.some_true:
        problem = "every example already has its soft and its true label; set it to 0"
        yield Clash(("prior.replay", "prior.label_weight"), problem)
    if prior.classes == "known" and config.train.head == "own":
        yield Clash(("prior.classes", "train.head"), _NEVER_COMPETE)
    if prior.loss == "squared":
        if isinstance(config.memory.selector, ReconstructionSelector):
            problem = "approximates gradients of a softmax, but squared differences have others; choose another"
            yield Clash(("memory.selector.kind", "prior.loss"), problem)
        if prior.classes == "known":
            yield Clash(("prior.classes", "prior.loss"), "is about a softmax, but there is none; leave it seen")
        if prior.temperature != 1:
            yield Clash(("prior.temperature", "prior.loss"), "squared differences are of undivided logits; set it to 1")
        if config.memory.dtype != "fp32":
            problem = "stores logits up to a constant, but squared differences need the logits; set it to fp32"
            yield Clash(("memory.dtype", "prior.loss"), problem)


def _scaled(config: RunConfig) -> Iterator[Clash]:
    if not config.prior.scale_to_new:
        return
    if config.prior.scale_to_task:
        yield Clash(
            ("prior.scale_to_new", "prior.scale_to_task"), "both scale the weight of memory; unset one of the two"
        )
    if not config.memory.kept:
        yield Clash(("prior.scale_to_new", "memory.size"), "needs a memory; set memory.size, or memory.total")


def _corrected(config: RunConfig) -> Iterator[Clash]:
    memory, prior = config.memory, config.prior
    if prior.correct.share == 0:
        return
    key = "prior.correct.share"
    if memory.total == 0:
        yield Clash(
            (key, "memory.total"), "is a share of memory.total, which is 0; set that to the number of examples to keep"
        )
    if not memory.balanced:
        yield Clash(
            ("memory.balanced", key), "held-out and kept examples must be equally many of each class; set it to true"
        )
    if isinstance(memory.selector, GreedySelector) or memory.selector.kind == "reservoir":
        problem = "chooses from the whole past and cannot hold a part out; choose another selector"
        yield Clash(("memory.selector.kind", key), problem)
    if config.train.head == "own":
        yield Clash(("train.head", key), "new and old classes must compete to be corrected; set it to seen")
    if config.train.data != "task" or config.train.restart:
        yield Clash(("train.data", key), "a correction holds examples out of a task; set task and train.restart=false")
    if config.evaluate.classifier != "head":
        yield Clash(
            ("evaluate.classifier", key), "a correction is of logits, which class means do not have; set it to head"
        )
    if prior.quadratic.weight > 0:
        problem = "curvature would also be measured on held-out examples; set it to 0"
        yield Clash(("prior.quadratic.weight", key), problem)
    if prior.topology.nodes > 0:
        problem = "nodes would also be placed at held-out examples, which are then learned; set it to 0"
        yield Clash(("prior.topology.nodes", key), problem)


def _frozen(config: RunConfig) -> Iterator[Clash]:
    train = config.train
    if "features" in train.frozen and train.head_epochs > 0:
        problem = "only the last layer learns in every epoch anyway; leave it 0, and set train.epochs"
        yield Clash(("train.head_epochs", "train.frozen"), problem)


def _competing(config: RunConfig) -> Iterator[Clash]:
    train = config.train
    if train.competing == "seen":
        return
    if train.head == "own":
        yield Clash(
            ("train.competing", "train.head"), "is about classes of other tasks; leave it seen, or set train.head=seen"
        )
    if train.competing == "all":
        yield from _all_compete(config)
    elif train.data != "task":
        problem = "distinguishes a task's own images from those of the past; leave it seen, or set train.data=task"
        yield Clash(("train.competing", "train.data"), problem)
    measured = config.measures_curvature and not isinstance(config.curvature, SiCurvature | OptimizerCurvature)
    if train.competing == "task" and measured:
        problem = "trains a task among its own classes, but curvature is measured among all seen; leave it seen"
        used = "quadratic" if config.prior.quadratic.weight > 0 else "fromp"
        yield Clash(("train.competing", f"prior.{used}.weight"), problem)
    if train.loss == "sigmoid":
        yield Clash(("train.competing", "train.loss"), "is about a softmax, but there is none; leave it seen")


def _all_compete(config: RunConfig) -> Iterator[Clash]:
    """Soft labels and measurements use the classes seen."""
    prior, key = config.prior, "train.competing"
    problem = "lets future classes compete only in rows with true labels, but this term has only the classes seen"
    soft = config.memory.kept and prior.some_soft and prior.weight != (0.0,) and prior.loss != "squared"
    others = {
        "prior.replay": soft,
        "prior.distill.weight": prior.distill.weight > 0,
        "prior.quadratic.weight": prior.quadratic.weight > 0,
        "prior.fromp.weight": prior.fromp.weight > 0,
        "prior.correct.share": prior.correct.share > 0,
        "prior.topology.nodes": prior.topology.nodes > 0,
    }
    for other, there in others.items():
        if there:
            yield Clash((key, other), f"{problem}; leave it seen")


def _topology(config: RunConfig) -> Iterator[Clash]:
    topology, train = config.prior.topology, config.train
    if topology.nodes == 0:
        return
    key = "prior.topology.nodes"
    if train.data != "task" and not train.restart:  # with restart: reported by _fresh_network
        yield Clash((key, "train.data"), "keeps the past in place while a new task is learned; set train.data=task")
    if topology.anchor == 0 and topology.minmax == 0:
        yield Clash(
            (key, "prior.topology.anchor"), "has no effect if anchor and minmax are 0; set one above 0, or this to 0"
        )
    if getattr(config.engine, "compile", False):
        problem = "reads features in every step, which compiled code does not show; set engine.compile=false"
        yield Clash((key, "engine.compile"), problem)
    if "features" in train.frozen:
        yield Clash((key, "train.frozen"), "moves features, which are frozen; leave it 0")
    if train.head_epochs:
        yield Clash(
            (key, "train.head_epochs"), "moves features, which are fixed in head_epochs; set train.head_epochs=0"
        )


def _tested(config: RunConfig) -> Iterator[Clash]:
    if config.evaluate.classifier == "nearest_mean" and not config.memory.kept:
        problem = "class means are those of memory's examples; set memory.size or memory.total"
        yield Clash(("evaluate.classifier", "memory.size"), problem)
    of_memory = config.evaluate.classifier == "nearest_mean" and config.evaluate.means == "memory"
    memory = config.memory
    if of_memory and memory.kept and not memory.balanced and not isinstance(memory.selector, GreedySelector):
        problem = "may keep no example of a class, which would have no mean; set it to true, or evaluate.means=data"
        yield Clash(("memory.balanced", "evaluate.classifier"), problem)
    if config.evaluate.classifier != "nearest_mean" and config.evaluate.means != "memory":
        problem = "applies to evaluate.classifier=nearest_mean only; set that, or leave it memory"
        yield Clash(("evaluate.means", "evaluate.classifier"), problem)
    if config.evaluate.classifier == "prototype" and config.train.restart:
        problem = "keeps the prototypes of classes from task to task; set train.restart=false"
        yield Clash(("evaluate.classifier", "train.restart"), problem)


RULES = (
    _fresh_network,
    _counted_twice,
    _normal,
    _fromp,
    _memory_alone,
    _distilled,
    _sigmoids,
    _logits_kept,
    _scaled,
    _corrected,
    _frozen,
    _competing,
    _topology,
    _tested,
)
