"""Settings that have no effect in a run, such as those of terms that are off.

They are allowed in files, because one recipe serves many methods. On the command line a setting is expected to have an
effect, so those without one are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hpccl.config.curvature import EkfacCurvature, KroneckerCurvature
from hpccl.config.memory import GreedySelector

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["unheard"]


class _Silence(NamedTuple):
    """keys: a setting, or a section; but: the key that switches it on; when: it has no effect; why: the reason."""

    keys: str
    but: str
    when: Callable[[RunConfig], bool]
    why: str


def _off(section: str, switch: str) -> _Silence:
    """A section of `prior` that is off while one of its numbers is 0."""
    path = f"prior.{section}.{switch}"
    return _Silence(f"prior.{section}", path, lambda c: getattr(getattr(c.prior, section), switch) == 0, f"{path} is 0")


_SILENCES = (
    _off("quadratic", "weight"),
    _off("normal", "precision"),
    _off("fromp", "weight"),
    _off("distill", "weight"),
    _off("correct", "share"),
    _off("topology", "nodes"),
    _Silence(
        "prior.quadratic.products",
        "",
        lambda c: not isinstance(c.curvature, (KroneckerCurvature, EkfacCurvature)),
        "only curvature.kind=kronecker and ekfac use it",
    ),
    _Silence(
        "curvature",
        "",
        lambda c: not c.measures_curvature and not c.records_path,
        "no term of training uses a curvature (prior.quadratic.weight is 0, and no posterior kernel of FROMP is used)",
    ),
    _Silence(
        "memory.selector", "", lambda c: not c.memory.kept, "there is no memory (memory.size, total and fraction are 0)"
    ),
    _Silence(
        "memory.balanced",
        "",
        lambda c: isinstance(c.memory.selector, GreedySelector),
        "memory.selector.kind=greedy keeps classes balanced",
    ),
    _Silence(
        "prior.replay",
        "",
        lambda c: c.memory.size > 0 and c.prior.replay != "coverage" and not c.prior.mixes and _none_replayed(c),
        "in such a small memory, this share gives no example its true label",
    ),
    _Silence(
        "prior.share_of", "", lambda c: not c.memory.kept, "there is no memory (memory.size, total and fraction are 0)"
    ),
    _Silence(
        "prior.share_of",
        "",
        lambda c: not (c.prior.some_true and c.prior.some_soft),
        "all of memory has one kind of label (prior.replay is 0 or 1)",
    ),
    _Silence("model.dropout", "", lambda c: c.model.kind == "vgg_small", "vgg_small has no dropout"),
    _Silence(
        "prior.scale_to_task",
        "",
        lambda c: not c.memory.kept,
        "there is no memory (memory.size, total and fraction are 0)",
    ),
)


def _none_replayed(config: RunConfig) -> bool:
    return config.prior.some_true and config.prior.num_replayed(config.memory.size, config.memory.size) == 0


def unheard(configs: Sequence[RunConfig], overrides: Sequence[str]) -> list[str]:
    """A line for each `key=value` that has no effect in any of the runs."""
    found = []
    for override in overrides:
        key = override.partition("=")[0]
        reasons = [_reason(config, key) for config in configs]
        if reasons and reasons[0] is not None and all(reasons):
            found.append(f"{override} has no effect here: {reasons[0]}")
    return found


def _reason(config: RunConfig, key: str) -> str | None:
    for silence in _SILENCES:
        within = key == silence.keys or key.startswith(f"{silence.keys}.")
        if within and key != silence.but and silence.when(config):
            return silence.why
    return None
