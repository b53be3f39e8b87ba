"""Which weights are held (kept as they are) while the rest learns.

Held are the parts in train.frozen; during train.head_epochs, all but the new classes' rows of the last layer; and rows
of the last layer that weight decay alone would act on.

The last layer has rows for all classes of the stream from the beginning. Those of later tasks mostly have no gradient:
weight decay alone would act on them, and a late class would begin with weights close to zero. With own heads and no
prior from the past, weight decay would shrink the rows of earlier tasks in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.optim import SamOptim, TimmOptim
from hpccl.data.protocols import Task
from hpccl.engine.protocols import trainable
from hpccl.errors import ConfigError
from hpccl.train.score import last_layer
from hpccl.train.state import RunState, World

__all__ = ["check_frozen", "hold", "last_name"]

_OLD = "old_classes"  # rows of the last layer
_LAYERS = (_ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm)


def hold(task: Task, state: RunState, world: World, *, head_only: bool) -> None:
    """Set which weights the engine holds from now on; collective.

    Frozen parts and rows of classes without loss that would otherwise shrink; or, with `head_only`, all but the new
    classes' rows of the last layer.

    Raises:
        ConfigError: a pattern matches nothing, or the network's last layer is needed and is not an nn.Linear.
    """
    begun = task.index > 0 or isinstance(world.config.adapt, AnyAdaptation)  # an adapted network has learned, too
    frozen = world.config.train.frozen if begun else ()
    still = frozenset(_norms(state.engine.module) if world.config.train.norms == "running" and begun else ())
    silent = _silent(task, state, world)
    if not head_only and not frozen and not silent:
        state.engine.hold({}, still)
        return
    # From `like`, as parameters may be sharded (FSDP2, ZeRO): their full shapes.
    shapes = {name: value.shape for name, value in state.engine.like.items()}
    if head_only:
        last = last_name(state, world, "train.head_epochs")
        held = {name: _without_rows(shape, task.classes, name.startswith(f"{last}.")) for name, shape in shapes.items()}
        state.engine.hold(held, frozenset(_norms(state.engine.module)))
        return
    names = set().union(*(_matching(pattern, state, world) for pattern in frozen if pattern != _OLD))
    held = {name: torch.ones([1] * len(shape), dtype=torch.bool) for name, shape in shapes.items() if name in names}
    held = {**_held_rows(task, silent, state, world), **held}
    norms = (name for name in _norms(state.engine.module) if f"{name}.running_mean" in names)
    state.engine.hold(held, frozenset(norms) | still)


def check_frozen(state: RunState, world: World) -> None:
    """Check before the first task that train.frozen applies to this network; collective.

    Raises:
        ConfigError: as `hold`.
    """
    for pattern in world.config.train.frozen:
        if pattern == _OLD:
            last_name(state, world, f"train.frozen={_OLD}")
        else:
            _matching(pattern, state, world)


def _held_rows(task: Task, silent: set[int], state: RunState, world: World) -> dict[str, Tensor]:
    """Return masks, by parameter of the last layer, of rows to hold: `silent` classes, and old ones if configured."""
    asked = task.index > 0 and _OLD in world.config.train.frozen
    old = {number for other in world.stream.tasks[: task.index] for number in other.classes} if asked else set()
    if not silent | old:
        return {}
    try:
        last = last_name(state, world, f"train.frozen={_OLD}")
    except ConfigError:
        if asked:
            raise
        return {}  # logits that are not made by a linear layer have no rows
    return {
        name: _rows(value.shape, silent | old)
        for name, value in state.engine.like.items()
        if name.startswith(f"{last}.")
    }


def _silent(task: Task, state: RunState, world: World) -> set[int]:
    """Return the classes that no loss or prior concerns in this task, so that their rows would shrink."""
    optim = world.config.optim
    finished = _finished(task, world) if _forgets(state, world) else set()
    if not isinstance(optim, TimmOptim | SamOptim):
        return finished  # a variational optimiser has a prior on all weights, those of classes to come included
    if optim.weight_decay == 0:
        return set()
    return finished | (set() if _named(state, world) else _to_come(task, world))


def _forgets(state: RunState, world: World) -> bool:
    """Whether no loss, prior or data preserves the heads of earlier tasks."""
    config, prior = world.config, state.prior
    said = max(config.prior.weight) > 0 or config.prior.label_weight > 0 or config.prior.fromp.weight > 0
    spoken = (len(prior.memory) > 0 and said) or prior.quadratic is not None or config.prior.distill.weight > 0
    spoken = spoken or config.prior.normal.precision > 0
    alone = config.train.data == "task" and not isinstance(config.adapt, AnyAdaptation)
    return config.train.head == "own" and alone and not spoken


def _named(state: RunState, world: World) -> bool:
    """Whether losses involve classes to come, so that their weights learn: as competitors, or as logits (DER)."""
    train, prior = world.config.train, world.config.prior
    squared = prior.loss == "squared" and train.head == "seen" and len(state.prior.memory) > 0
    return train.competing == "all" or squared


def _to_come(task: Task, world: World) -> set[int]:
    """Return the classes of later tasks that no task up to this one has."""
    first, then = world.stream.tasks[: task.index + 1], world.stream.tasks[task.index + 1 :]
    return {number for each in then for number in each.classes} - {number for each in first for number in each.classes}


def _finished(task: Task, world: World) -> set[int]:
    """Return the classes of earlier tasks that this one does not have."""
    return {number for each in world.stream.tasks[: task.index] for number in each.classes} - set(task.classes)


def _without_rows(shape: torch.Size, classes: tuple[int, ...], last: bool) -> Tensor:
    """Return a mask that holds a whole parameter (to be broadcast) or, of the last layer, all rows but `classes`."""
    if not last:
        return torch.ones([1] * len(shape), dtype=torch.bool)
    held = torch.ones(shape[0], *[1] * (len(shape) - 1), dtype=torch.bool)
    held[list(classes)] = False
    return held


def _rows(shape: torch.Size, classes: set[int]) -> Tensor:
    """Return a mask of the rows of `classes` in a parameter of the last layer."""
    held = torch.zeros(shape[0], *[1] * (len(shape) - 1), dtype=torch.bool)
    held[sorted(classes)] = True
    return held


def last_name(state: RunState, world: World, asked_by: str) -> str:
    """Return the name of the linear layer that makes the logits; collective."""
    module = state.engine.module
    layer = last_layer(module, world, state, asked_by=asked_by)
    (found,) = (name for name, each in module.named_modules() if each is layer)
    return str(found)


def _norms(module: nn.Module) -> Iterator[str]:
    """Yield the names of normalisation layers with running statistics."""
    yield from (
        name for name, each in module.named_modules() if isinstance(each, _NormBase) and each.track_running_stats
    )


def _matching(pattern: str, state: RunState, world: World) -> set[str]:
    """Return the names of parameters and buffers that a pattern of train.frozen matches."""
    module = state.engine.module
    every = {*trainable(module), *(name for name, _ in module.named_buffers())}
    if pattern == "features":
        last = last_name(state, world, "train.frozen=features")
        found = {name for name in every if name.rpartition(".")[0] != last}
    elif pattern == "convolutions":
        layers = {name for name, each in module.named_modules() if isinstance(each, _LAYERS)}
        found = {name for name in every if name.rpartition(".")[0] in layers}
    else:
        found = {name for name in every if fnmatchcase(name, pattern)}
    if not found:
        some = ", ".join(sorted(every)[:4])
        raise ConfigError(
            f"train.frozen: '{pattern}' matches no parameter or buffer of {type(module).__name__}; allowed: features, "
            f"convolutions (if the network has any), {_OLD}, or names with * and ?, such as {some}"
        )
    return found
