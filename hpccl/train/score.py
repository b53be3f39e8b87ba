"""A pass over a task that records the input of the last layer and the logits of the competing classes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpccl.data.protocols import Split, Task
from hpccl.errors import ConfigError
from hpccl.train.passes import shared_images
from hpccl.train.state import RunState, World

__all__ = ["Look", "competing", "input_of", "last_layer", "looks"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Look:
    """A batch of this rank's examples in the evaluation view; n may be 0.

    sample: [n] positions
    valid: [n] bool, could be decoded
    logits: [n, K] fp32, of the competing classes in ascending order
    x: [n, d] fp32, input of the last layer with a 1 for its bias appended; [n, 0] if not requested
    """

    sample: Ints
    valid: npt.NDArray[np.bool_]
    logits: Tensor
    x: Tensor


def competing(task: Task, world: World) -> list[int]:
    """Return the competing classes of the task's examples, ascending: its own, or all seen up to it."""
    own = world.config.train.head == "own"
    judged = [task] if own else list(world.stream.tasks[: task.index + 1])
    return sorted({number for other in judged for number in other.classes})


def looks(
    samples: Ints, classes: list[int], state: RunState, world: World, *, inputs: bool, split: Split = "train"
) -> Generator[Look, None, None]:
    """Yield this rank's share of `samples` in batches, equally many on every rank, as passes are collective.

    inputs: also record the input of the last layer
    split: that the sample positions refer to

    Raises:
        ConfigError: the last layer is no nn.Linear.
        Stopped: the run was asked to stop.
    """
    engine = state.engine
    with contextlib.ExitStack() as cleanup:
        latest = None
        if inputs:
            latest = cleanup.enter_context(input_of(last_layer(engine.module, world, state)))
        for seen in shared_images(samples, world, size=world.stream_batch, split=split):
            number = len(seen.sample)
            logits = engine.predict(seen.pixels)[:number, classes]
            x = logits.new_zeros(number, 0)
            if latest is not None:
                x = latest()[:number]
                x = torch.cat([x, x.new_ones(number, 1)], dim=1)
            yield Look(seen.sample, seen.valid.numpy()[:number], logits, x)


def last_layer(module: nn.Module, world: World, state: RunState, *, asked_by: str | None = None) -> nn.Linear:
    """Return the linear layer that makes the logits, found by a pass over a blank image; collective.

    asked_by: the setting that needs it, for error messages; None: the selector

    Raises:
        ConfigError: another kind of layer makes them.
    """
    called: list[tuple[nn.Linear, torch.Size]] = []

    def note(layer: nn.Module, _: Any, out: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        called.append((layer, out.shape))

    handles = [each.register_forward_hook(note) for each in module.modules() if isinstance(each, nn.Linear)]
    try:
        blank = torch.zeros(1, *world.stream.image_shape, device=state.engine.device)
        logits = state.engine.predict(blank)
    finally:
        for handle in handles:
            handle.remove()
    found = [layer for layer, shape in called if shape == logits.shape]
    if not found:
        by = asked_by or f"memory.selector.kind={world.config.memory.selector.kind}"
        instead = "omit it" if asked_by else "use uniform, reservoir, greedy, gini, error or residual"
        looks_at = "needs the last layer" if asked_by else "needs the inputs of the last layer"
        raise ConfigError(
            f"{by} {looks_at}, which must be an nn.Linear; {type(module).__name__} has none that computes its "
            f"{logits.shape[1]} logits; {instead}"
        )
    return found[-1]


@contextlib.contextmanager
def input_of(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that returns the input [n, d] fp32 of the layer's latest call, once."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        caught[:] = [arguments[0].detach()]

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield lambda: caught.pop().float()
    finally:
        handle.remove()
