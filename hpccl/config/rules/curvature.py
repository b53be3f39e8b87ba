"""What curvatures ask of the optimiser, the engine and the path of training."""

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

# Kinds of optimisers that learn a curvature; of timm's, those with LEARNING_SQUARES do.
_LEARNING = ("ivon", "vogn", "soba")


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
    for key in budgets(config.memory):
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
        problem = "leaves no Fisher matrix, of which the posterior's kernel is made; leave it 1"
        yield Clash((key, "prior.fromp.kernel"), problem)
    if isinstance(config.memory.selector, ReconstructionSelector):
        problem = "assumes a quadratic of the loss, which groups do not make; leave group 1, or use another selector"
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
    if set(config.curvature.fraction) != {1}:
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


RULES = (
    _learned_curvature,
    _grouped,
    _importance,
    _path,
)
