"""What optimisers ask of the schedule, the network and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.curvature import KroneckerCurvature, Measured
from hpccl.config.engine import DdpEngine, DeepspeedEngine
from hpccl.config.optim import LieOptim, MultiplicativeGroup, TimmOptim, VognOptim
from hpccl.config.stream import DigitsStream

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]

# Optimisers that treat every weight by itself, so that a part of a tensor is updated as the whole would be. Others
# (lamb, adafactor, muon, ...) take norms of whole tensors. Adagrad would be one of these, but makes its state before
# there are shards.
_ELEMENTWISE = {
    *("sgd", "momentum", "sgdw", "adam", "adamw", "adamax", "nadam", "nadamw", "radam", "adabelief", "adan"),
    *("adopt", "adoptw", "laprop", "lion", "rmsprop", "rmsproptf", "adadelta"),
}

_WITHOUT_MOMENTUM = {"adam", "adamw", "adamax", "nadam", "nadamw", "radam", "adabelief", "adan", "lion", "lamb"}


def _schedule(config: RunConfig) -> Iterator[Clash]:
    optim, train = config.optim, config.train
    if optim.schedule == "constant" and optim.final_lr != 0:
        keys = ("optim.final_lr", "optim.schedule")
        yield Clash(keys, "a constant schedule has no last learning rate; set optim.schedule=cosine, or leave it 0")
    adam = isinstance(optim, TimmOptim) and optim.name.lower() in _WITHOUT_MOMENTUM
    if isinstance(optim, TimmOptim) and adam and optim.momentum != TimmOptim().momentum:
        problem = "is of sgd, and this optimiser has betas: leave it out, and set optim.options={betas: [0.9, 0.999]}"
        yield Clash(("optim.momentum", "optim.name"), problem)
    if train.accumulate > train.batch_size:
        keys = ("train.accumulate", "train.batch_size")
        yield Clash(keys, f"cuts a batch of {train.batch_size} rows into more pieces than it has rows")
    curvature = config.curvature
    if isinstance(curvature, KroneckerCurvature) and curvature.keep_trace < 1 and curvature.tasks.kind == "refit":
        keys = ("curvature.keep_trace", "curvature.tasks.kind")
        yield Clash(keys, "eigenbases are whole and cannot be of low rank; leave it 1, or sum tasks in another way")
    if isinstance(curvature, Measured) and curvature.samples != 1 and curvature.fisher != "mc":
        keys = ("curvature.samples", "curvature.fisher")
        yield Clash(keys, "labels are drawn only with curvature.fisher=mc")


def _clipped(config: RunConfig) -> Iterator[Clash]:
    optim = config.optim
    multiplies = isinstance(optim, LieOptim) and isinstance(optim.group, MultiplicativeGroup)
    if config.train.clip_norm is not None and multiplies:
        problem = "clips the mean gradient, of which the multiplicative rule makes no use: set it to null"
        yield Clash(("train.clip_norm", "optim.group.kind"), problem)


def _lengths(config: RunConfig) -> Iterator[Clash]:
    if isinstance(config.stream, DigitsStream):
        tasks, keys = config.stream.tasks, ("stream.tasks",)
    else:
        tasks, keys = sum(part.tasks for part in config.stream.parts), ("stream.parts",)
    for key, values in (
        ("train.epochs", config.train.epochs),
        ("optim.lr", config.optim.lr),
        ("prior.weight", config.prior.weight),
        ("curvature.fraction", getattr(config.curvature, "fraction", ())),
    ):
        if len(values) > max(tasks, 1):
            yield Clash((key, *keys), f"has {len(values)} values, but the stream has {tasks} tasks")


def _shards(config: RunConfig) -> Iterator[Clash]:
    engine = config.engine
    if isinstance(engine, DdpEngine) or (isinstance(engine, DeepspeedEngine) and engine.stage == 0):
        return
    if isinstance(config.optim, TimmOptim) and config.optim.name.lower() not in _ELEMENTWISE:
        known = ", ".join(sorted(_ELEMENTWISE))
        problem = f"looks at whole tensors, and this engine has its state in shards; allowed here: {known}"
        yield Clash(("optim.name", "engine.kind"), problem)
    if isinstance(config.optim, TimmOptim) and config.optim.options.get("caution"):
        problem = "takes a mean over whole tensors, and this engine has them in shards; leave it out, or use ddp"
        yield Clash(("optim.options.caution", "engine.kind"), problem)
    if engine.kind == "fsdp2" and engine.compile and engine.recompute:
        yield Clash(("engine.recompute", "engine.compile"), "blocks are compiled one by one; set one of the two")


def _per_example(config: RunConfig) -> Iterator[Clash]:
    """Of VOGN, whose squares are made of what goes into a layer and what comes back to it."""
    if not isinstance(config.optim, VognOptim):
        return
    if not isinstance(config.engine, DeepspeedEngine) and config.engine.compile:
        problem = "compiled code does not show what comes into a layer; set it to false, or use optim.kind=ivon"
        yield Clash(("engine.compile", "optim.kind"), problem)
    if config.engine.recompute:
        problem = "calls layers twice in a pass, whose inputs count once; set it to false, or use optim.kind=ivon"
        yield Clash(("engine.recompute", "optim.kind"), problem)
    for key, used in (
        ("prior.fromp.weight", config.prior.fromp.weight > 0),
        ("prior.topology.nodes", config.prior.topology.nodes > 0),
    ):
        if used:
            problem = "couples examples, whose squared gradients then are no sum of their own; use optim.kind=ivon"
            yield Clash((key, "optim.kind"), problem)


RULES = (
    _schedule,
    _clipped,
    _lengths,
    _shards,
    _per_example,
)
