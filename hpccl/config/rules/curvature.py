"""What curvatures require of the optimiser, the engine and the training path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.curvature import DiagonalCurvature, MasCurvature, Measured, OptimizerCurvature, SiCurvature
from hpccl.config.engine import DeepspeedEngine
from hpccl.config.memory import ReconstructionSelector
from hpccl.config.optim import LEARNING_SQUARES, TimmOptim
from hpccl.config.rules.common import budgets

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]

# Kinds of optimisers that learn a curvature; of timm's optimisers, those in LEARNING_SQUARES do.
_LEARNING = ("ivon", "vogn", "soba")


def _learned_curvature(config: RunConfig) -> Iterator[Clash]:
    """Clashes of a curvature that the optimiser learns, without a pass."""
    curvature, optim, usual = config.curvature, config.optim, Measured()
    if not isinstance(curvature, OptimizerCurvature):
        return
    for key in ("fisher", "samples", "fraction"):
        if getattr(curvature, key) != getattr(usual, key):
            yield Clash(
                (f"curvature.{key}", "curvature.kind"), "is about a pass over the task, but there is none; leave it out"
            )
    if config.prior.quadratic.weight == 0:
        return
    timm = isinstance(optim, TimmOptim)
    if not (optim.name.lower() in LEARNING_SQUARES if isinstance(optim, TimmOptim) else optim.kind in _LEARNING):
        problem = (
            f"this optimiser learns no curvature; allowed: optim.kind={', '.join(_LEARNING)}, or optim.name="
            f"{', '.join(LEARNING_SQUARES)}; or curvature.kind=diagonal"
        )
        yield Clash(("curvature.kind", "optim.name" if timm else "optim.kind"), problem)
    if isinstance(optim, TimmOptim) and config.train.clip_norm is not None:
        problem = "this optimiser learns its curvature from clipped gradients; leave it null"
        yield Clash(("train.clip_norm", "curvature.kind"), f"{problem}, or use curvature.kind=diagonal")
    if isinstance(optim, TimmOptim) and optim.name.lower() != "adamw" and optim.weight_decay > 0:
        problem = "is a part of the gradients whose squares this optimiser averages; set it to 0, or use adamw"
        yield Clash(("optim.weight_decay", "curvature.kind"), problem)
    if config.train.first_task_from is not None:
        problem = "the optimiser that learned the first task's curvature is in another run; use curvature.kind=diagonal"
        yield Clash(("train.first_task_from", "curvature.kind"), problem)
    for key in budgets(config.memory):
        problem = "the optimiser learns from the memory's examples too, which the quadratic must not count; set it to 0"
        yield Clash((key, "curvature.kind"), f"{problem}, or use curvature.kind=diagonal")
    for key, used, what in (
        ("prior.distill.weight", config.prior.distill.weight > 0, "distillation"),
        ("prior.normal.precision", config.prior.normal.precision > 0, "the normal prior"),
        ("prior.topology.nodes", config.prior.topology.nodes > 0, "the topology"),
    ):
        if used:
            problem = f"the optimiser learns from {what}, too, which the quadratic must not count"
            yield Clash((key, "curvature.kind"), f"{problem}; use curvature.kind=diagonal")


def _grouped(config: RunConfig) -> Iterator[Clash]:
    """Clashes of averaging gradients over groups of examples before squares or absolute values are taken."""
    curvature, engine, key = config.curvature, config.engine, "curvature.group"
    if (
        not isinstance(curvature, (DiagonalCurvature, MasCurvature))
        or curvature.group == 1
        or not config.measures_curvature
    ):
        return
    if isinstance(curvature, DiagonalCurvature) and curvature.fisher != "empirical":
        problem = f"groups average gradients of true labels, but {curvature.fisher} uses others; set it to empirical"
        yield Clash(("curvature.fisher", key), problem)
    if isinstance(curvature, MasCurvature) and curvature.variant == "local":
        yield Clash((key, "curvature.variant"), "averages gradients of the network's output; leave it 1, or set global")
    if config.prior.fromp.weight > 0:
        problem = "gives no Fisher matrix, which the posterior's kernel needs; leave it 1"
        yield Clash((key, "prior.fromp.kernel"), problem)
    if isinstance(config.memory.selector, ReconstructionSelector):
        problem = "assumes a quadratic of the loss, which groups do not give; set group to 1, or use another selector"
        yield Clash(("memory.selector.kind", key), problem)
    if engine.kind == "fsdp2" or (isinstance(engine, DeepspeedEngine) and engine.stage == 3):
        problem = "needs whole gradients, but this engine shards them; leave it 1, or use ddp"
        yield Clash((key, "engine.kind"), problem)


def _importance(config: RunConfig) -> Iterator[Clash]:
    """Clashes of importances, which are no curvature of the loss."""
    if not isinstance(config.curvature, (MasCurvature, SiCurvature)) or config.prior.quadratic.weight == 0:
        return
    if isinstance(config.memory.selector, ReconstructionSelector):
        problem = "assumes a quadratic of the loss, which importances do not give; use another selector"
        yield Clash(("memory.selector.kind", "curvature.kind"), problem)


def _path(config: RunConfig) -> Iterator[Clash]:
    """Clashes with SI, which needs every step of a task, from its first weights to its last."""
    train = config.train
    if not isinstance(config.curvature, SiCurvature):
        return
    if set(config.curvature.fraction) != {1}:
        yield Clash(("curvature.fraction", "curvature.kind"), "si makes no pass over examples; leave it 1")
    if not config.records_path:
        return
    if config.prior.normal.precision > 0:
        problem = "adds a pull to the weights, which si would count as an effect of the loss; set it to 0"
        yield Clash(("prior.normal.precision", "curvature.kind"), problem)
    if not isinstance(config.optim, TimmOptim):
        problem = "takes gradients at other weights than those it updates, but si needs the same weights; use timm"
        yield Clash(("optim.kind", "curvature.kind"), problem)
    if train.ema is not None:
        problem = "ends a task at averaged weights, but si needs the last weights of its path; leave it null"
        yield Clash(("train.ema", "curvature.kind"), problem)
    if train.first_task_from is not None:
        problem = "leaves the first task without a training path, which si needs; leave it null"
        yield Clash(("train.first_task_from", "curvature.kind"), problem)
    if train.head_epochs > 0:
        problem = "adds a second training path within a task, but si follows only one; set it to 0"
        yield Clash(("train.head_epochs", "curvature.kind"), problem)


RULES = (
    _learned_curvature,
    _grouped,
    _importance,
    _path,
)
