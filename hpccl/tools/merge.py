"""Merge networks of one architecture into one, without data: `hpccl merge`.

The mathematics is in hpccl.curvature.merging. Weights and curvature are read, merged and written a layer at a time, so
memory use is that of the largest layer of all networks, however many layers there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never, final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hpccl.checkpoint.streamed import Writer, writing
from hpccl.config.model import ModelConfig
from hpccl.curvature import merging
from hpccl.curvature.merging import Model, Solved
from hpccl.errors import ConfigError, DataError, FolderError
from hpccl.folder import replacing_folder
from hpccl.models.build import skeleton
from hpccl.models.exported import CONFIG, WEIGHTS
from hpccl.tools.export import README, refuse_what_is_there, write_text
from hpccl.tools.merge_sources import Curvature, Source, groups_of, open_source, open_weights, refuse_other

__all__ = ["Merged", "Method", "merge"]

Method: TypeAlias = Literal["matching", "fisher", "arithmetic", "average"]

_ModelConfig: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


@final
@dataclass(frozen=True)
class Merged:
    """What was written.

    num_weights: elements of parameters and buffers
    num_measured: elements of parameters whose curvature is known in all merged networks
    steps: of conjugate gradients, in the layer that took most
    averaged: names of floating-point buffers, such as running statistics
    """

    folder: Path
    num_weights: int
    num_measured: int
    steps: int
    averaged: tuple[str, ...]


@final
@dataclass(frozen=True)
class _Plan:
    """What is merged, and how.

    shapes, dtypes: of parameters and buffers as written, in the network's order
    parameters: names of the floating-point parameters, which are merged
    """

    sources: Sequence[Source]
    scales: Sequence[float]
    base: Source | None
    method: Method
    prior_precision: float
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    parameters: Sequence[str]

    @property
    def curvatures(self) -> list[Curvature]:
        if self.method in ("arithmetic", "average"):
            return []
        every = [*self.sources, *([self.base] if self.base else [])]
        return [source.curvature for source in every if source.curvature is not None]


def merge(
    models: Sequence[Path],
    out: Path,
    *,
    base: Path | None = None,
    weights: Sequence[float] | None = None,
    method: Method = "matching",
    prior_precision: float = 1e-3,
    force: bool = False,
) -> Merged:
    """Merge networks and write the result to the folder `out`, as `hpccl export` writes one.

    Args:
        models: folders of runs (their newest finished task), or of `hpccl export --curvature`.
        out: the folder to write; it appears whole or not at all.
        base: the network that all of them started from, likewise, or a .safetensors file of its weights.
        weights: a_t of every network; None: 1 each. Negative weights remove what a network learned.
        method: `matching` (uncertainty-based gradient matching) and `arithmetic` (task arithmetic) need a base,
            `fisher` (Fisher averaging) and `average` have none.
        prior_precision: delta > 0, in nats per squared weight: added to the base's curvature (`matching`) or to every
            network's (`fisher`).
        force: replace an earlier export in `out`.

    Raises:
        CheckpointError: a network is damaged.
        ConfigError: networks or arguments are incompatible, or the merged precision is not positive definite.
        DataError: an export is damaged.
        DivergedError: weights or curvature are not finite.
        FolderError: `out` exists and may not be replaced, or one of the folders is no network.
    """
    scales = _checked_scales(models, weights, method, base, prior_precision)
    for path in (*models, *(() if base is None else (base,))):
        if out.resolve() in (path.resolve(), path.resolve().parent if path.is_file() else path.resolve()):
            raise FolderError(f"--out '{out}' is one of the networks to merge; choose another folder")
    refuse_what_is_there(out, force=force)
    sources = [open_source(path) for path in models]
    plan = _plan(sources, scales, None if base is None else open_weights(base), method, prior_precision)
    with replacing_folder(out) as beside:
        tensors = {name: (plan.dtypes[name], shape) for name, shape in plan.shapes.items()}
        with writing(beside / WEIGHTS, tensors, metadata={"format": "pt"}) as writer:
            measured, steps = _merge_parameters(plan, writer)
            averaged = _merge_buffers(plan, writer)
        write_text(beside / CONFIG, json.dumps(_config(plan), indent=2) + "\n")
        write_text(beside / README, _readme(plan, out, averaged))
    return Merged(out, sum(math.prod(shape) for shape in plan.shapes.values()), measured, steps, averaged)


def _checked_scales(
    models: Sequence[Path],
    weights: Sequence[float] | None,
    method: Method,
    base: Path | None,
    prior_precision: float,
) -> list[float]:
    """Return the weight of every network.

    Raises:
        ConfigError: arguments are incompatible or out of range.
    """
    if not models:
        raise ConfigError("nothing to merge: give at least one run or export")
    scales = [1.0] * len(models) if weights is None else list(weights)
    if len(scales) != len(models):
        raise ConfigError(f"--weights has {len(scales)} numbers for {len(models)} networks; give one per network")
    if not all(math.isfinite(scale) for scale in scales):
        raise ConfigError(f"--weights {','.join(map(str, scales))}; allowed: finite numbers")
    if not (math.isfinite(prior_precision) and prior_precision > 0):
        raise ConfigError(f"--prior-precision {prior_precision}; allowed: a finite number above 0")
    with_base = method in ("matching", "arithmetic")
    if with_base and base is None:
        raise ConfigError(
            f"--method {method} needs --base, the network that all were trained from (a run, an export or a "
            ".safetensors file); without a base, use --method fisher or average"
        )
    if not with_base and base is not None:
        raise ConfigError(f"--method {method} takes no --base; omit it, or use --method matching or arithmetic")
    if not with_base and min(scales) <= 0:
        raise ConfigError(
            f"--weights {min(scales):g} with --method {method}; allowed: numbers above 0; to remove what a "
            "network learned, use --method matching or arithmetic with a --base"
        )
    return scales


def _plan(
    sources: Sequence[Source], scales: Sequence[float], base: Source | None, method: Method, prior_precision: float
) -> _Plan:
    """Check that the networks can be merged, and plan how.

    Raises:
        ConfigError: networks differ, or one lacks the curvature that the method needs.
        DataError: an export is damaged.
    """
    model = _network(sources[0])
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    refuse_other(sources, base, shapes)
    if method in ("matching", "fisher"):
        for source in sources:
            if source.curvature is None:
                raise ConfigError(
                    f"'{source.label}' has no curvature, which --method {method} needs: train with "
                    "prior.quadratic.weight=1 (curvature.kind neither mas nor si), and export with "
                    f"`hpccl export --curvature`; or use --method {'arithmetic' if base else 'average'}"
                )
    learned = {name for name, value in model.named_parameters() if value.is_floating_point()}
    return _Plan(
        sources,
        scales,
        base,
        method,
        prior_precision,
        shapes,
        {name: torch.float32 if value.is_floating_point() else value.dtype for name, value in own.items()},
        [name for name in shapes if name in learned],
    )


def _network(source: Source) -> torch.nn.Module:
    assert source.config is not None
    ours = source.config["hpccl"]
    try:
        return skeleton(
            _ModelConfig.validate_python(ours["model"]),
            image_shape=tuple(ours["image_shape"]),
            num_classes=ours["num_classes"],
        )
    except (ValidationError, KeyError, TypeError) as error:
        raise DataError(f"the export in '{source.label}' is damaged: {error}; write it again") from error


# ---------------------------------------------------------------- weights


def _merge_parameters(plan: _Plan, writer: Writer) -> tuple[int, int]:
    """Merge and write the parameters; return `Merged.num_measured` and `Merged.steps`."""
    measured, steps = 0, 0
    for group, names in groups_of(plan.curvatures, plan.parameters):
        models = [_model(source, scale, names, plan) for source, scale in zip(plan.sources, plan.scales, strict=True)]
        base = None if plan.base is None else _model(plan.base, 1.0, names, plan)
        solved = _solved(group, base, models, plan)
        for name, value in solved.weights.items():
            writer.write(name, value.view(plan.shapes[name]).float())
        steps = max(steps, solved.steps)
        known = [{name for curve in model.curves for name in curve.names} for model in models]
        measured += sum(math.prod(plan.shapes[name]) for name in names if all(name in each for each in known))
    return measured, steps


def _model(source: Source, scale: float, names: Sequence[str], plan: _Plan) -> Model:
    """Read one network's weights and curvature of a group of parameters."""
    curvature = source.curvature if plan.curvatures else None
    found = {} if curvature is None else curvature.groups
    curves = [curvature.read(group) for group, own in found.items() if curvature and set(own) & set(names)]
    return Model(scale, {name: source.weight(name) for name in names}, curves)


def _solved(group: str, base: Model | None, models: Sequence[Model], plan: _Plan) -> Solved:
    match plan.method:
        case "matching":
            return merging.matched(group, base, models, damping=plan.prior_precision)
        case "fisher":
            return merging.matched(group, None, models, damping=plan.prior_precision)
        case "arithmetic":
            assert base is not None
            merging.refuse_infinite(group, [base, *models])
            return merging.arithmetic(base.weights, models)
        case "average":
            merging.refuse_infinite(group, models)
            return merging.average(models)
        case _:
            assert_never(plan.method)


def _merge_buffers(plan: _Plan, writer: Writer) -> tuple[str, ...]:
    """Write the other tensors and return the names of those that are averaged.

    Floating-point ones are averaged over the networks with positive weight, or taken from the base if there is none;
    integers are the first network's.
    """
    averaged = []
    added = [(source, scale) for source, scale in zip(plan.sources, plan.scales, strict=True) if scale > 0]
    kept = added or ([] if plan.base is None else [(plan.base, 1.0)])
    for name in plan.shapes:
        if name in plan.parameters:
            continue
        if not plan.dtypes[name].is_floating_point or not kept:
            writer.write(name, _first(plan, name))
            continue
        averaged.append(name)
        models = [Model(scale, {name: source.weight(name)}, ()) for source, scale in kept]
        merging.refuse_infinite(name, models)
        writer.write(name, merging.average(models).weights[name].view(plan.shapes[name]).float())
    return tuple(averaged)


def _first(plan: _Plan, name: str) -> Tensor:
    return plan.sources[0].weight(name).view(plan.shapes[name]).to(plan.dtypes[name])


# ---------------------------------------------------------------- config.json and README.md


def _config(plan: _Plan) -> dict[str, Any]:
    """Return the first network's config.json with the tasks of all networks of positive weight, or else the base's."""
    first = plan.sources[0].config
    assert first is not None
    tasks: list[dict[str, Any]] = []
    added = [source for source, scale in zip(plan.sources, plan.scales, strict=True) if scale > 0]
    for source in added or [each for each in (plan.base,) if each is not None]:
        known = [] if source.config is None else source.config["hpccl"]["tasks"]
        tasks += [task for task in known if task not in tasks]
    ours = {key: value for key, value in first["hpccl"].items() if key not in ("run", "checkpoint")}
    merged = {
        "method": plan.method,
        "models": [
            {"path": source.label, "weight": scale} for source, scale in zip(plan.sources, plan.scales, strict=True)
        ],
        "base": None if plan.base is None else plan.base.label,
        "prior_precision": plan.prior_precision,
    }
    return {**first, "hpccl": {**ours, "tasks": tasks, "merged": merged}}


def _readme(plan: _Plan, out: Path, averaged: Sequence[str]) -> str:
    rows = "\n".join(
        f"| `{source.label}` | {scale:g} |" for source, scale in zip(plan.sources, plan.scales, strict=True)
    )
    base = "" if plan.base is None else f", starting from `{plan.base.label}`"
    statistics = (
        f"\nIts {len(averaged)} running statistics (such as `{averaged[0]}`) are averages over the networks with "
        "positive weights, or the base's if there are none. "
        "They do not match merged weights exactly: recompute them before use by passing some training images through "
        "the network in training mode.\n"
        if averaged
        else ""
    )
    return _README.format(method=_WORDS[plan.method], base=base, rows=rows, out=out, statistics=statistics)


_WORDS: Mapping[Method, str] = {
    "matching": "uncertainty-based gradient matching",
    "fisher": "Fisher averaging",
    "arithmetic": "task arithmetic",
    "average": "averaging weights",
}

_README = """# Merged network

`hpccl merge` made this network from others by {method}{base}; weights are fp32.

| network | weight |
|---|---:|
{rows}

## Load

Input, normalisation and class names are those of the first network, given in `config.json`.

```python
from hpccl.models.exported import load_exported

model = load_exported("{out}")
```

A timm model can also be loaded with `timm.create_model("local-dir:{out}", pretrained=True)`.
{statistics}"""
