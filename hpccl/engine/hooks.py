"""Gradient hooks: called once a step on each parameter's gradient, before it is averaged over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves, fetch
from hpccl.engine.protocols import GradientHook, Weights

__all__ = ["Hooks"]


@final
class Hooks:
    """The gradient hooks by parameter; several of one parameter are called in turn.

    far: where weights are spread, whole weights that hooks need of other layers. A layer's own are gathered while its
        gradient is computed; only a dense curvature needs others, and its network is small
    """

    def __init__(self) -> None:
        self.far: dict[str, Tensor] = {}
        self._hooks: dict[str, GradientHook] = {}
        self._called: set[str] = set()
        self._wanted: set[str] | None = None

    def add(self, hooks: Sequence[tuple[str, GradientHook]], comm: Comm, *, spread: bool) -> Callable[[], None]:
        """Add hooks; return a function that removes them. Collective where weights are spread."""
        for name, hook in hooks:
            self._hooks[name] = _both(self._hooks[name], hook) if name in self._hooks else hook
        everyone = self._hooks.items()
        far = {needed for name, hook in everyone for needed in hook.needs if _layer(needed) != _layer(name)}
        self._wanted = far if spread and comm.any(bool(far)) else None

        def remove() -> None:
            for name, _ in hooks:
                self._hooks.pop(name, None)
            self._wanted, self.far = None, {}

        return remove

    def fetch(self, weights: Callable[[], Leaves], comm: Comm) -> None:
        """Fetch `far` before a pass whose gradients are hooked; collective if a hook needs other layers' weights."""
        if self._wanted is not None:
            self.far = fetch(weights(), self._wanted, comm)

    def call(self, name: str, gradient: Tensor, weights: Callable[[str], Tensor], *, idle: bool = False) -> Tensor:
        """Return a parameter's gradient after its hooks.

        weights: from a name to whole weights
        idle: the gradient is not used, so that its hooks are only known to be reached
        """
        hook = self._hooks.get(name)
        if hook is None:
            return gradient
        self._called.add(name)
        if idle:
            return gradient
        return hook.call(gradient, {needed: weights(needed) for needed in hook.needs})

    def silent(self) -> set[str]:
        """Return the parameters whose hooks were not called since the last call of this method."""
        found = self._hooks.keys() - self._called
        self._called.clear()
        return found


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _both(first: GradientHook, second: GradientHook) -> GradientHook:
    def call(gradient: Tensor, weights: Weights) -> Tensor:
        return second.call(first.call(gradient, weights), weights)

    return GradientHook(tuple(dict.fromkeys((*first.needs, *second.needs))), call)
