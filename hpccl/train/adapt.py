"""Adapting a trained network to a change of its data, prior or architecture, by a K-prior instead of retraining.

The run's objective over its past is replaced by what its last checkpoint has: soft labels of the memory, the quadratic
if it has one, and the normal prior's pull (hpccl.prior.normal). The adaptation adds

    add        the nats of the new examples
    remove     minus the nats of the examples to be forgotten (hpccl.train.removal)
    precision  delta'/2 |w|^2 in place of delta/2 |w|^2
    model      nothing: another network learns the soft labels, with delta/2 |w|^2 of its own weights

Source: Khan and Swaroop 2021, "Knowledge-adaptation priors", NeurIPS, section 4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpccl.checkpoint.store import Mark, latest, load, open_shards
from hpccl.config.adaptation import AnyAdaptation, NewModel, RemoveData
from hpccl.config.run import RunConfig
from hpccl.data.build import open_stream
from hpccl.data.layout import ClassTask
from hpccl.data.protocols import Stream, Task
from hpccl.errors import FolderError
from hpccl.folder import RunFolder
from hpccl.memory.store import Memory
from hpccl.prior.prior import Prior
from hpccl.train.copies import added_data, copies_of, open_for
from hpccl.train.plan import plan_task
from hpccl.train.removal import removed_samples
from hpccl.train.soft_labels import soft_labels, write_soft_labels
from hpccl.train.state import RunState, World

__all__ = [
    "adaptation_steps",
    "adaptation_task",
    "begin_adapting",
    "check_adaptation",
    "continues",
    "last_mark",
]


def adaptation_task(config: RunConfig, stream: Stream) -> ClassTask:
    """Return the single task of an adaptation, with the index of the stream's last: the added examples, or none.

    The reference has the same task and trains on all examples up to its end.
    """
    last, stop = stream.tasks[-1], len(stream.labels("train"))
    added = stream.added if len(stream.added) else range(stop, stop)
    classes = range(len(stream.class_names))
    return ClassTask(last.index, config.method, tuple(classes), added, last.samples("test"))


def continues(config: RunConfig) -> bool:
    """Whether an adaptation starts from the weights of the run that it adapts."""
    adapt = config.adapt
    return isinstance(adapt, AnyAdaptation) and not adapt.retrain and not isinstance(adapt, NewModel)


def last_mark(run: Path) -> Mark:
    """Return the checkpoint at the end of a run's newest task.

    Raises:
        FolderError: there is none.
    """
    folder = RunFolder(run)
    folder.require()
    mark = latest(folder.checkpoints)
    if mark is None or mark.phase != "done":
        where = "has no checkpoint yet" if mark is None else f"has only reached {mark.name}"
        raise FolderError(
            f"'{run}' {where}, but only a finished run can be adapted or extended; continue the run to its end first"
        )
    return mark


def check_adaptation(config: RunConfig) -> None:
    """Check what depends on the adapted run and its data, before a folder is made.

    Raises:
        DataError: added or removed data is not what the run can take.
        FolderError: the run has not ended, has no memory, or its data changed.
    """
    adapt = config.adapt
    assert isinstance(adapt, AnyAdaptation), "of an adaptation"
    stream = open_for(config, RunFolder(Path(config.path)))
    if isinstance(adapt, RemoveData):
        removed_samples(adapt, stream)
    if adapt.task != len(stream.tasks) - 1:
        raise FolderError(
            f"'{adapt.source}' has learned {adapt.task + 1} of {len(stream.tasks)} tasks; continue it to its end first"
        )
    if not adapt.retrain:
        _source_tree(config, stream)


def _source_tree(config: RunConfig, stream: Stream) -> tuple[dict[str, Any], Mark]:
    """Return the last checkpoint of the adapted run, and its mark."""
    adapt = config.adapt
    assert isinstance(adapt, AnyAdaptation), "of an adaptation"
    run = Path(adapt.source)
    mark, copies = last_mark(run), copies_of(config, RunFolder(run))
    tree = load(RunFolder(run).checkpoints, mark)
    base = stream if not added_data(config) else open_stream(config.stream, config.data, copies=copies)
    if tree["data"] != base.fingerprint:
        raise FolderError(f"the data changed since '{run}' was trained; restore the shards it was trained with")
    if len(tree["prior"]["memory"]["sample"]) == 0:
        raise FolderError(
            f"'{run}' kept no examples (memory.size=0), but an adaptation learns from the soft labels of kept "
            "examples; train it with a memory, as in configs/method/kpriors.yaml"
        )
    return tree, mark


def begin_adapting(state: RunState, world: World) -> None:
    """Set the state from which an adaptation starts; nothing is done for other runs and references. Collective.

    Raises:
        FolderError: the adapted run, or its data, has changed.
    """
    config = world.config
    if not isinstance(config.adapt, AnyAdaptation) or config.adapt.retrain:
        return
    tree, mark = _source_tree(config, world.stream)
    if isinstance(config.adapt, NewModel):
        state.prior = Prior(_own_file(Memory.from_state_dict(tree["prior"]["memory"]), world))
        return
    engine, shards = state.engine, open_shards(RunFolder(Path(config.adapt.source)).checkpoints, mark)
    engine.put(tree["engine"]["weights"])
    state.prior = Prior.from_state_dict(tree["prior"], shards, world.comm, engine.place, engine.like).to(engine.device)
    if not isinstance(config.adapt, RemoveData):
        state.prior = replace(state.prior, memory=_own_file(state.prior.memory, world))
        return
    task, heads = adaptation_task(config, world.stream), state.prior.memory.heads
    with world.phase(task, "relabel") as phase:
        memory = _with_removed(state.prior, config.adapt, world.stream)
        phase.images = len(memory)
        file, soft = write_soft_labels(task, soft_labels(memory, heads, state, world), world)
    state.prior = replace(state.prior, memory=memory.mapped(soft, heads, file))


def _own_file(memory: Memory, world: World) -> Memory:
    """Copy the soft labels to a file of this run, so that its checkpoints do not depend on the adapted run's."""
    share = world.comm.share(len(memory))
    own = memory.soft[share.start : share.stop]
    file, soft = write_soft_labels(adaptation_task(world.config, world.stream), own, world)
    return memory.mapped(soft, memory.heads, file)


def _with_removed(prior: Prior, adapt: RemoveData, stream: Stream) -> Memory:
    """Return the memory with all examples to be forgotten; their weight is that of the soft label that is taken back.

    Replayed examples contribute their true label only and are simply left out. Examples in a quadratic have their soft
    label there, and weight 0 here.
    """
    removed, memory = removed_samples(adapt, stream), prior.memory
    gone = torch.from_numpy(np.isin(memory.sample.numpy(), removed))
    replayed = memory.sample[gone & memory.replay].numpy()
    kept = memory.only(~(gone & memory.replay)) if len(replayed) else memory
    weight = kept.weight.clone()
    weight[torch.from_numpy(np.isin(kept.sample.numpy(), removed))] = 1.0
    kept = replace(kept, weight=weight)
    rest = np.setdiff1d(removed, memory.sample.numpy())
    labels = stream.labels("train")
    for task in stream.tasks:
        span = task.samples("train")  # tasks may share classes
        own = rest[(rest >= span.start) & (rest < span.stop)]
        kept = kept.admit(
            task=task.index,
            sample=torch.from_numpy(own),
            label=torch.from_numpy(labels[own]),
            replay=torch.zeros(len(own), dtype=torch.bool),
            weight=torch.full((len(own),), 0.0 if prior.quadratic is not None else 1.0),
        )
    return kept


def adaptation_steps(task: Task, memory: Memory, world: World) -> list[int]:
    """Return the steps of each task of the stream; only the last is trained."""
    return [0] * task.index + [plan_task(world.config, world.stream, task, memory).num_steps]
