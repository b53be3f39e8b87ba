"""A gradient that is not finite: save what helps to find the cause, and report it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpccl.checkpoint.streamed import write_tensors
from hpccl.config.base import per_task
from hpccl.data.protocols import Task
from hpccl.data.rows import Rows
from hpccl.dist.spread import Leaf
from hpccl.engine.sharded import is_spread
from hpccl.errors import DivergedError, FolderError
from hpccl.folder import replacing
from hpccl.train.compose import MicroBatch
from hpccl.train.state import RunState, World
from hpccl.train.step import TERM_NAMES

__all__ = ["Failure", "diagnose"]


@dataclass(frozen=True)
class Failure:
    """The step that failed: this rank's micro-batches, and its share of the loss terms [6]."""

    task: Task
    step: int
    parts: Sequence[MicroBatch]
    rows: Sequence[Rows]
    terms: Tensor


def diagnose(failure: Failure, state: RunState, world: World) -> DivergedError:
    """Save the batch and the weights in the run folder and return the error to raise.

    Collective: the gradient's norm is the same on all ranks, so all of them call this together.
    """
    terms = failure.terms.clone()
    world.comm.sum_([terms])
    named = {name: float(value) for name, value in zip(TERM_NAMES, terms, strict=True)}
    said = {name: value for name, value in named.items() if value != 0 or name == "new"}  # the others are not in use
    weights = {name: _own(leaf) for name, leaf in state.engine.gather().items()}
    flags = torch.tensor([not bool(torch.isfinite(value).all()) for value in weights.values()], dtype=torch.float32)
    world.comm.sum_([flags])
    broken = [name for name, flag in zip(weights, flags.tolist(), strict=True) if flag]
    spread = is_spread(state.engine.module)  # then each rank saves its own elements
    note = world.folder.path / f"diverged-rank-{world.comm.rank}"
    kept = _kept(failure, named, broken, weights if world.comm.leader or spread else {}, note)
    lost = world.comm.any(not kept)  # on any rank; not raised, as the run's divergence matters more
    where = f"The batch and the weights are in '{note}.*'"
    if lost:
        where = f"Not all processes could write the batch and the weights to '{note}.*'"
    return DivergedError(
        f"the gradient is not finite at step {failure.step} of task {failure.task.index} ('{failure.task.name}'); "
        f"loss terms in nats per example: {', '.join(f'{name} {value:.4g}' for name, value in said.items())}; "
        f"weights that are not finite: {', '.join(broken[:3]) or 'none'}. {where}; "
        f"the last checkpoint is untouched. {_advice(failure, world)}"
    )


def _advice(failure: Failure, world: World) -> str:
    """Return advice on what to change; in another folder, as a folder keeps the settings of its run."""
    config = world.config
    lr, quadratic, limit = config.optim.lr, config.prior.quadratic, config.train.clip_norm
    changes = [f"Lower optim.lr ({per_task(lr, failure.task.index):g} in this task)"]
    if quadratic.weight > 0 and failure.task.index > 0:
        changes.append(
            f"lower prior.quadratic.weight ({quadratic.weight:g}; steps overshoot where its curvature is large)"
        )
    changes.append("set train.clip_norm" if limit is None else f"lower train.clip_norm ({limit:g})")
    changes += ["use engine.precision=fp32"] if config.engine.precision == "bf16" else []
    again = "in another folder=... (or name=...), as the settings of this run are fixed"
    if failure.task.index > 0:
        again += f"; train.first_task_from={world.folder.path} there reuses a first task with the same settings"
    return f"{', or '.join(changes)}: {again}"


def _own(leaf: Leaf) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else leaf.local


def _kept(failure: Failure, terms: dict[str, float], broken: list[str], weights: dict[str, Tensor], note: Path) -> bool:
    """Write this rank's part; return whether that succeeded."""
    description = {
        "task": failure.task.index,
        "step": failure.step,
        "terms": {name: str(value) for name, value in terms.items()},
        "weights_not_finite": broken,
        "new_offsets": [int(row) for part in failure.parts for row in part.batch.new[part.rows]],
        "memory_slots": [int(row) for part in failure.parts for row in part.batch.slot[part.rows]],
    }
    tensors = {f"pixels.{number}": rows.pixels.cpu().contiguous() for number, rows in enumerate(failure.rows)}
    tensors |= {f"weights.{name}": value.cpu().contiguous() for name, value in weights.items()}
    try:
        with replacing(note.with_suffix(".json")) as path:
            path.write_text(json.dumps(description, indent=1))
        with replacing(note.with_suffix(".safetensors")) as path:
            write_tensors(path, tensors)
    except FolderError:
        return False
    return True
