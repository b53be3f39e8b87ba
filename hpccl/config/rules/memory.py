"""What a memory requires of its budget, its selector and the terms that use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.memory import ReconstructionSelector, StratifiedMix
from hpccl.config.prior import PriorConfig
from hpccl.config.rules.common import budgets, differs
from hpccl.config.stream import DigitsStream

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]


def _one_budget(config: RunConfig) -> Iterator[Clash]:
    first, *others = budgets(config.memory) or [""]
    if others:
        yield Clash(
            (first, *others), "each of these sets how many examples are kept; keep one, and set the others to 0"
        )


def _selector(config: RunConfig) -> Iterator[Clash]:
    selector = config.memory.selector
    if not config.memory.kept or not isinstance(selector, ReconstructionSelector):
        return
    if selector.probes == 0 and not config.prior.some_true:
        problem = "soft labels have no gradient at the weights that end a task; set probes > 0, or prior.replay > 0"
        yield Clash(("memory.selector.probes", "prior.replay"), problem)
    if selector.weights == "fitted" and config.memory.total > 0:
        problem = "fits weights to all chosen examples, but later tasks leave fewer of these"
        yield Clash(
            ("memory.selector.weights", "memory.total"), f"{problem}; set it to equal, or memory.size instead of total"
        )
    if selector.weights == "equal" and differs(selector, ReconstructionSelector(), "ridge"):
        usual = ReconstructionSelector().ridge
        problem = f"applies to fitted weights only; set memory.selector.weights=fitted, or leave it {usual}"
        yield Clash(("memory.selector.ridge", "memory.selector.weights"), problem)


def _mixed(config: RunConfig) -> Iterator[Clash]:
    if config.memory.kept and isinstance(config.memory.mix, StratifiedMix) and config.train.batch_size == 1:
        problem = "needs new and memory rows in every step, but a step has one row; raise it, or set natural"
        yield Clash(("memory.mix.kind", "train.batch_size"), problem)


def _needs_memory(config: RunConfig) -> Iterator[Clash]:
    prior, usual = config.prior, PriorConfig()
    if config.memory.kept:
        return
    # scale_to_task, balanced and the selector only set how a memory would be used; they may be in a file that all
    # methods share.
    ignored = [f"prior.{key}" for key in ("replay", "weight") if differs(prior, usual, key)]
    if isinstance(config.memory.mix, StratifiedMix):
        ignored.append("memory.mix.kind")
    problem = "needs a memory; set memory.size to the examples kept of each task, or memory.total"
    for key in ignored:
        yield Clash((key, "memory.size"), problem)


def _copies(config: RunConfig) -> Iterator[Clash]:
    if not config.memory.kept or config.memory.keep == "reference":
        return
    if isinstance(config.stream, DigitsStream):
        problem = "the digits are a part of scikit-learn and cannot go missing; leave it reference"
        yield Clash(("memory.keep", "stream.kind"), problem)
    beside = {
        "prior.correct.share": (config.prior.correct.share > 0, "held-out examples"),
        "prior.topology.nodes": (config.prior.topology.nodes > 0, "images of the nodes"),
        "evaluate.means": (config.evaluate.means == "data", "all training images of the past"),
    }
    for key, (there, what) in beside.items():
        if there:
            yield Clash(("memory.keep", key), f"copies memory alone, but {what} are read as well; leave it reference")


def _needs_soft_labels(config: RunConfig) -> Iterator[Clash]:
    prior, usual = config.prior, PriorConfig()
    if config.memory.kept and prior.some_soft:
        return
    empty = not config.memory.kept
    cause = ("memory.size",) if empty else ("prior.replay",)
    why = "there is no memory; set memory.size" if empty else "all of the memory has true labels; set prior.replay < 1"
    for key in ("temperature", "view", "classes"):
        if differs(prior, usual, key):
            yield Clash((f"prior.{key}", *cause), f"is about soft labels, but {why}, or leave it {getattr(usual, key)}")


def _fading(config: RunConfig) -> Iterator[Clash]:
    """Online EWC. Damping and anchor only set how a quadratic would be used, and may be in a shared file."""
    quadratic = config.prior.quadratic
    if quadratic.weight == 0 and quadratic.decay < 1:
        problem = "there is no quadratic to decay; set prior.quadratic.weight, or leave it 1"
        yield Clash(("prior.quadratic.decay", "prior.quadratic.weight"), problem)


RULES = (
    _one_budget,
    _selector,
    _mixed,
    _needs_memory,
    _copies,
    _needs_soft_labels,
    _fading,
)
