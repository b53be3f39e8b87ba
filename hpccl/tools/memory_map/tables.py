"""Tables from the figures of examples, by example, task, class and memory, and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccl.checkpoint.store import load, marks
from hpccl.data.protocols import task_numbers
from hpccl.errors import DataError
from hpccl.memory.store import Memory
from hpccl.tools.memory_map.found import Found
from hpccl.train.evaluate import evaluate_all
from hpccl.train.pictures import thumbnail
from hpccl.train.state import RunState, World

__all__ = ["classes_of", "memory_over_tasks", "pictures", "table_of", "tasks_of"]

Ints = npt.NDArray[np.int64]


def table_of(found: Sequence[Found], state: RunState, world: World) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of all groups' examples, sorted by sample."""
    sample = np.concatenate([each.sample for each in found])
    order = np.argsort(sample)
    sample = sample[order]
    names = [name for name in found[0].columns if all(name in each.columns for each in found)]
    return {
        "sample": sample,
        "task": task_numbers(world.stream.tasks, "train", sample),
        "label": world.stream.labels("train")[sample],
        "in_memory": np.isin(sample, state.prior.memory.sample.numpy()),
        **{name: np.concatenate([each.columns[name] for each in found])[order] for name in names},
    }


def tasks_of(table: dict[str, npt.NDArray[Any]], state: RunState, world: World) -> list[dict[str, Any]]:
    """Return mean nats of every task's examples, as learned and with each left out, and of its test data."""
    own = world.config.train.head == "own"
    results = _test_results(state, world)
    tested = {result["task"]: result["task_incremental" if own else "class_incremental"] for result in results}
    rows = []
    for number in np.unique(table["task"]).tolist():
        here = table["task"] == number
        newton = table.get("left_out_newton")
        rows.append(
            {
                "task": number,
                "name": world.stream.tasks[number].name,
                "examples": int(here.sum()),
                "train_nats": float(table["nats"][here].mean()),
                "left_out": float(table["left_out"][here].mean()),
                "left_out_newton": None if newton is None else float(newton[here].mean()),
                "test_nats": None if tested.get(number) is None else float(tested[number]["nll"]),
            }
        )
    return rows


def _test_results(state: RunState, world: World) -> list[dict[str, Any]]:
    """Return the results of the plain network, as the other figures are, whatever the run itself was tested with."""
    train = world.config.train
    plain = state.prior.correction is None and state.prior.means is None and not train.flip_test
    if plain and state.mark.phase == "done":
        return state.results
    config = world.config.model_copy(update={"train": train.model_copy(update={"flip_test": False})})
    alone = replace(state, prior=replace(state.prior, correction=None, means=None))
    return evaluate_all(alone, replace(world, config=config), last=state.mark.task)


def classes_of(table: dict[str, npt.NDArray[Any]], found: Sequence[Found], world: World) -> list[dict[str, Any]]:
    """Return figures of every class: means over its examples, and their mean nats without the class, where known."""
    labels, rows = world.stream.labels("train"), []
    for number in np.unique(table["label"]).tolist():
        here = table["label"] == number
        rows.append(
            {
                "class": number,
                "name": world.stream.class_names[number],
                "task": int(table["task"][here][0]),
                "examples": int(here.sum()),
                "nats": float(table["nats"][here].mean()),
                "left_out": float(table["left_out"][here].mean()),
                "removed": _removed(number, found, labels),
                "sensitivity": float(table["sensitivity"][here].mean()),
                "leverage": float(table["leverage"][here].sum()),
            }
        )
    return rows


def _removed(number: int, found: Sequence[Found], labels: Ints) -> float | None:
    """Return a class's mean nats had it not been learned, over all groups that have it; None if unknown in one."""
    parts = [(int((labels[each.sample] == number).sum()), each.removed.get(number)) for each in found]
    there = [(count, value) for count, value in parts if count]
    known = [(count, value) for count, value in there if value is not None]
    if len(known) < len(there):
        return None
    return sum(count * value for count, value in known) / sum(count for count, _ in known)


def memory_over_tasks(table: dict[str, npt.NDArray[Any]], state: RunState, world: World) -> list[dict[str, Any]]:
    """Describe the memory at the end of every task up to this checkpoint."""
    checkpoints, rows = world.folder.checkpoints, []
    for mark in marks(checkpoints):
        if mark.phase != "done" or mark > state.mark:
            continue
        memory = Memory.from_state_dict(load(checkpoints, mark)["prior"]["memory"])
        if not len(memory):
            continue
        past = table["task"] <= mark.task
        kept = np.isin(table["sample"][past], memory.sample.numpy())
        count = int(kept.sum())
        top = np.argsort(-table["sensitivity"][past], kind="stable")[:count]
        of_class = np.bincount(memory.label.numpy())[np.unique(memory.label.numpy())]
        rows.append(
            {
                "task": mark.task,
                "size": len(memory),
                "per_task": memory.per_task(mark.task + 1),
                "smallest_class": int(of_class.min()),
                "largest_class": int(of_class.max()),
                "agreement": memory.agreement(mark.task + 1),
                "sensitive_share": float(kept[top].mean()) if count else None,
                "chance": float(kept.mean()) if count else None,
            }
        )
    return rows


def pictures(samples: Ints, world: World) -> dict[int, npt.NDArray[np.uint8]]:
    """Return thumbnails by sample."""
    found = {}
    for sample in samples.tolist():
        with contextlib.suppress(DataError):  # data.bad_images is `skip`, and the image is gone
            found[sample] = thumbnail(world.stream.raw(sample))
    return found
