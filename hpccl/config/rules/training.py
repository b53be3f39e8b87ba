"""What optimisers require of the schedule, the network and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.curvature import KroneckerCurvature, Measured
from hpccl.config.engine import DdpEngine, DeepspeedEngine
from hpccl.config.model import TimmModel
from hpccl.config.optim import LieOptim, MultiplicativeGroup, TimmOptim, VognOptim
from hpccl.config.stream import DigitsStream

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]

# Optimisers that update every weight by itself, so that a part of a tensor is updated as in the whole. Others (lamb,
# adafactor, muon, ...) use norms of whole tensors. Adagrad is elementwise too, but makes its state before there are
# shards.
_ELEMENTWISE = {
    *("sgd", "momentum", "sgdw", "adam", "adamw", "adamax", "nadam", "nadamw", "radam", "adabelief", "adan"),
    *("adopt", "adoptw", "laprop", "lion", "rmsprop", "rmsproptf", "adadelta"),
}

# Optimisers that no engine can run. Kron draws from torch's generator, which differs from process to process, and from
# one of its own, which is not saved.
_DRAWS = "draws random numbers in its step, so that every process would train another network; use another optimiser"
_UNFIT = {
    **dict.fromkeys(("kron", "kronw", "kronc"), _DRAWS),
    "adahessian": "needs second derivatives, which no engine computes; use another optimiser, or optim.kind=ivon",
}

_WITHOUT_MOMENTUM = {"adam", "adamw", "adamax", "nadam", "nadamw", "radam", "adabelief", "adan", "lion", "lamb"}


def _schedule(config: RunConfig) -> Iterator[Clash]:
    optim, train = config.optim, config.train
    if optim.schedule == "constant" and optim.final_lr != 0:
        keys = ("optim.final_lr", "optim.schedule")
        yield Clash(keys, "a constant schedule has no final learning rate; set optim.schedule=cosine, or leave it 0")
    adam = isinstance(optim, TimmOptim) and optim.name.lower() in _WITHOUT_MOMENTUM
    if isinstance(optim, TimmOptim) and adam and optim.momentum != TimmOptim().momentum:
        problem = "this optimiser has betas instead; leave it out, and set optim.options={betas: [0.9, 0.999]}"
        yield Clash(("optim.momentum", "optim.name"), problem)
    if train.accumulate > train.batch_size:
        keys = ("train.accumulate", "train.batch_size")
        yield Clash(keys, f"makes more micro-batches than a batch of {train.batch_size} has rows; lower it")
    curvature = config.curvature
    if isinstance(curvature, KroneckerCurvature) and curvature.keep_trace < 1 and curvature.tasks.kind == "refit":
        keys = ("curvature.keep_trace", "curvature.tasks.kind")
        yield Clash(keys, "an eigenbasis cannot be of low rank; leave it 1, or use another curvature.tasks.kind")
    if isinstance(curvature, Measured) and curvature.samples != 1 and curvature.fisher != "mc":
        keys = ("curvature.samples", "curvature.fisher")
        yield Clash(keys, "labels are drawn only with curvature.fisher=mc; set that, or leave it 1")


def _unfit(config: RunConfig) -> Iterator[Clash]:
    if isinstance(config.optim, TimmOptim):
        name = config.optim.name.lower().split("_")[-1]  # after timm's prefix `lookahead_`
        if name in _UNFIT:
            yield Clash(("optim.name",), _UNFIT[name])


def _tagged(config: RunConfig) -> Iterator[Clash]:
    model = config.model
    if isinstance(model, TimmModel) and "." in model.name and model.checkpoint is None:
        name, _, tag = model.name.partition(".")
        problem = f"names pretrained weights ({tag}), but none are read; set model.checkpoint, or {name} alone"
        yield Clash(("model.name", "model.checkpoint"), problem)


def _clipped(config: RunConfig) -> Iterator[Clash]:
    optim = config.optim
    multiplies = isinstance(optim, LieOptim) and isinstance(optim.group, MultiplicativeGroup)
    if config.train.clip_norm is not None and multiplies:
        problem = "clips the mean gradient, which the multiplicative rule does not use; set it to null"
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
        problem = f"needs whole tensors, but this engine shards its state; allowed here: {known}"
        yield Clash(("optim.name", "engine.kind"), problem)
    if isinstance(config.optim, TimmOptim) and config.optim.options.get("caution"):
        problem = "takes a mean over whole tensors, but this engine shards them; leave it out, or use ddp"
        yield Clash(("optim.options.caution", "engine.kind"), problem)
    if engine.kind == "fsdp2" and engine.compile and engine.recompute:
        yield Clash(
            ("engine.recompute", "engine.compile"), "fsdp2 cannot do both, block by block; set only one of the two"
        )


def _per_example(config: RunConfig) -> Iterator[Clash]:
    """Clashes of VOGN, whose squared gradients need the inputs of layers and the gradients at their outputs."""
    if not isinstance(config.optim, VognOptim):
        return
    if not isinstance(config.engine, DeepspeedEngine) and config.engine.compile:
        problem = "compiled code does not show a layer's inputs; set it to false, or use optim.kind=ivon"
        yield Clash(("engine.compile", "optim.kind"), problem)
    if config.engine.recompute:
        problem = "calls layers twice in a pass, but their inputs count once; set it to false, or use optim.kind=ivon"
        yield Clash(("engine.recompute", "optim.kind"), problem)
    for key, used in (
        ("prior.fromp.weight", config.prior.fromp.weight > 0),
        ("prior.topology.nodes", config.prior.topology.nodes > 0),
    ):
        if used:
            problem = "couples examples, which then have no gradients of their own; use optim.kind=ivon"
            yield Clash((key, "optim.kind"), problem)


RULES = (
    _schedule,
    _unfit,
    _tagged,
    _clipped,
    _lengths,
    _shards,
    _per_example,
)
