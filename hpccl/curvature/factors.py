"""Kronecker factors of linear maps and convolutions, and exact diagonals for all else, in one pass over the data.

KroneckerPass sums A and B of moments.py for every layer whose trainable weight is used as nn.Linear or nn.Conv2d use
it; all other trainable parameters get the exact diagonal, as in DiagonalEstimator. EigenPass then sums, in given
bases of the layers, the squares of per-example gradients (EKFAC):

    S = sum_n sum_columns (Qb' G_n Qa)^2,   G_n = sum_s g_ns a_ns'

No weight gradient is computed in the backward pass, and every output gradient is freed once it is added.
Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from hpccl.curvature.capture import measuring, working_bytes
from hpccl.curvature.columns import Fisher
from hpccl.curvature.coverage import Coverage, footprint, refuse_unfit, widen
from hpccl.curvature.layers import Rotation, acts_as_known, squares
from hpccl.curvature.moments import GradientMoment, InputMoment, Sharing, block_shape
from hpccl.curvature.protocols import Examples
from hpccl.curvature.pullback import looped_squares, mapped_squares, stream_gradients
from hpccl.curvature.sweep import (
    Forward,
    Sweep,
    at_the_end,
    fastest_layout,
    fit_examples,
    fitting,
    in_step,
    listed,
    planned_together,
    together,
    zeros_for,
)
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError, CoverageError

__all__ = ["BlockSums", "EigenPass", "KroneckerPass", "Measured", "Shape", "refuse_large"]

Shape = tuple[int, int, int]  # groups, outputs and inputs of a group (including the bias)
Bases = Mapping[str, tuple[Tensor, Tensor]]  # by layer, Qa [g, d, d] and Qb [g, o, o]

_GIB = 1 << 30


@dataclass(frozen=True)
class BlockSums:
    """One layer's factors, as sums over this rank's examples.

    weight, bias: full names of its parameters; bias is None if the layer has no trainable one
    a: [g, d, d] fp32, weighted; divided by the number of examples of all ranks it is the mean A
    b: [g, o, o] fp32
    """

    weight: str
    bias: str | None
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Measured:
    """The sums of a pass over this rank's examples, before any exchange between ranks.

    blocks: by module name
    squares: by full parameter name, in the parameter's shape, fp32
    count: [1] float64, sum of the weights of the examples
    """

    blocks: dict[str, BlockSums]
    squares: Mapping[str, Tensor]
    count: Tensor


@dataclass(frozen=True)
class KroneckerPass:
    """Measures Kronecker factors.

    fisher, samples, seed: see Sweep
    sharing: how positions that share a weight are combined; see moments.py
    precision: of the forward and backward pass; sums are always fp32
    diagonal: patterns (*, ?) of the names of modules that get the exact diagonal instead
    max_factor: the largest side of a factor that is allowed
    known: the coverage of a model whose weights are spread (coverage.plan_ahead); None: it is planned in the pass
    """

    fisher: Fisher = "mc"
    samples: int = 1
    seed: int = 0
    sharing: Sharing = "expand"
    precision: Literal["fp32", "bf16"] = "fp32"
    diagonal: tuple[str, ...] = ()
    max_factor: int = 16384
    known: Coverage | None = None

    def run(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Measured:
        """Run the pass; collective, but the sums stay local. The model is left unchanged.

        Raises:
            CoverageError: a trainable parameter is not covered, or a factor is too large.
            DataError: a label is outside its head.
            DivergedError: an activation or a gradient is not finite.
            WorldError: any of these on another rank.
        """
        coverage, examples = planned_together(model, batches, comm, self.known)

        def grown() -> _Growing:
            growing = self._begin(model, coverage)
            for part in in_step(model, examples, comm, partial(_fitting, growing.coverage.graph_bytes)):
                with measuring(model, part.pixels.device):
                    together(model, comm, partial(self._add, model, growing, part))
            return growing

        return at_the_end(model, comm, grown).measured(comm.device)

    def check(self, model: nn.Module) -> None:
        """Refuse now what `run` would refuse later, as far as this is known without data.

        Raises:
            ConfigError: a pattern matches nothing.
            CoverageError: a norm layer couples examples, or a factor is too large.
        """
        refuse_unfit(model)
        _refuse_idle_patterns(model, self.diagonal)
        layers = {name: {local: local for local in _trained(module)} for name, module in model.named_modules()}
        shapes = {
            name: _shape(model, name, names) for name, names in layers.items() if self._factored(model, name, names)
        }
        refuse_large(shapes, self.max_factor)

    def _begin(self, model: nn.Module, coverage: Coverage | None) -> _Growing:
        _refuse_idle_patterns(model, self.diagonal)
        coverage = coverage or Coverage({}, (), (), 0, 0)
        layers = {name: names for name, names in coverage.layers.items() if self._factored(model, name, names)}
        refuse_large({name: _shape(model, name, names) for name, names in layers.items()}, self.max_factor)
        blocks = {name: _allocated(model, name, names, self.sharing) for name, names in layers.items()}
        covered = {full for names in layers.values() for full in names.values()}
        rest = {name: zeros_for(value) for name, value in model.named_parameters() if value.requires_grad}
        return _Growing(coverage, blocks, {name: value for name, value in rest.items() if name not in covered})

    def _factored(self, model: nn.Module, name: str, names: Mapping[str, str]) -> bool:
        module = model.get_submodule(name)
        known = acts_as_known(module) if self.known is None else name in self.known.factored
        return "weight" in names and known and not any(fnmatchcase(name, pattern) for pattern in self.diagonal)

    def _add(self, model: nn.Module, growing: _Growing, part: Examples) -> None:
        """Add the sums of one part."""
        coverage = growing.coverage
        rows = widen(model, coverage.widened, len(part))
        laid = growing.laid(model, part)
        found = self.sweep.forward(model, coverage.layers, laid, autocast=self.autocast, widened=rows)
        root = None if bool((part.weight == 1).all()) else part.weight.sqrt()
        for name, block in growing.blocks.items():
            block.a.add_(found.calls[name][0].inputs[0], len(part), root)
        edges = found.edges | {name: get_gradient_edge(value) for name, value in rows.items()}
        stream_gradients(edges, found.logits, found.columns, self._visit(model, growing, found))
        pixels, columns = part.pixels, found.columns
        mapped = [name for name in coverage.mapped if name not in coverage.widened]
        growing.add(mapped_squares(model, mapped, pixels, columns, graph_bytes=coverage.graph_bytes))
        growing.add(looped_squares(model, coverage.looped, pixels, columns)[0])
        growing.count += float(part.weight.double().sum())
        if not growing.finite():
            raise self.sweep.blame(model, coverage.layers, part, growing.sums())

    def _visit(self, model: nn.Module, growing: _Growing, found: Forward) -> Callable[[str, Tensor], None]:
        def visit(name: str, grad: Tensor) -> None:
            if name in growing.blocks:
                growing.blocks[name].b.add_(grad, len(found.logits))
                return
            if name in growing.squares:  # a parameter with a row for each example
                growing.squares[name] += grad.float().square().sum(0, keepdim=True)
                return
            names = growing.coverage.layers[name]
            module, call = model.get_submodule(name), found.calls[name][0]
            dtype = module.get_parameter(next(iter(names))).dtype
            inputs = tuple(x.to(dtype) for x in call.inputs)
            by_local = squares(module, inputs, grad.to(dtype)[:, None], names, len(found.logits))
            growing.add({names[local]: value for local, value in by_local.items()})

        return visit

    @property
    def sweep(self) -> Sweep:
        """The vectors over the logits that are pulled back for every example."""
        return Sweep(self.fisher, self.samples, self.seed)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the passes; None: that of the weights."""
        return torch.bfloat16 if self.precision == "bf16" else None


@dataclass(frozen=True)
class EigenPass:
    """Measures the diagonal of layers in the eigenbases of the factors of a KroneckerPass.

    first: that pass, whose columns and precision are used again
    """

    first: KroneckerPass

    def run(self, model: nn.Module, batches: Iterable[Examples], comm: Comm, bases: Bases) -> dict[str, Tensor]:
        """Return S [g, o, d] fp32 by layer, of this rank's examples; collective, but the sums stay local.

        `bases` has the same layers on every rank. The model is left unchanged.

        Raises:
            DataError: a label is outside its head.
            DivergedError: an activation or a gradient is not finite.
            WorldError: any of these on another rank.
        """
        sums = {name: _outer_zeros(qa, qb) for name, (qa, qb) in bases.items()}

        known = self.first.known
        held = 0 if known is None else known.graph_bytes
        layout: torch.memory_format | None = None

        def size(batch: Examples) -> int:
            nonlocal held
            if not held:
                with measuring(model, batch.pixels.device):
                    held = footprint(model, batch.pixels) + 1
            return _fitting(2 * held, batch)  # as much again for rotated inputs

        def add() -> None:
            nonlocal layout
            for part in in_step(model, fit_examples(model, batches), comm, size):
                with measuring(model, part.pixels.device):
                    layout = layout or fastest_layout(model, part.pixels)
                    laid = replace(part, pixels=part.pixels.contiguous(memory_format=layout))
                    together(model, comm, partial(self._add, model, sums, bases, laid, room=held * len(laid) // 4))

        at_the_end(model, comm, add)
        return sums

    def _add(self, model: nn.Module, sums: Mapping[str, Tensor], bases: Bases, part: Examples, *, room: int) -> None:
        """room: elements of rotated inputs that may be cached."""
        sweep = self.first.sweep
        found = sweep.forward(model, bases, part, autocast=self.first.autocast)
        rotations: dict[str, Rotation] = {}

        def visit(name: str, grad: Tensor) -> None:
            nonlocal room
            if name not in rotations:
                x, module = found.calls[name][0].inputs[0].detach().float(), model.get_submodule(name)
                columns = len(found.columns)
                rotation = Rotation.of(module, x, bases[name], len(part), columns=columns, room=room)
                room -= 0 if rotation.kept is None else rotation.kept.numel()
                rotations[name] = rotation
            sums[name].add_(rotations[name].squares(grad.float()))

        stream_gradients(found.edges, found.logits, found.columns, visit)
        totals = {name: value.sum() for name, value in sums.items()}
        if totals and not bool(torch.stack(list(totals.values())).isfinite().all()):
            raise sweep.blame(model, {name: {} for name in bases}, part, totals)


def refuse_large(shapes: Mapping[str, Shape], max_factor: int) -> None:
    """Refuse factors with a side above `max_factor`.

    Raises:
        CoverageError: a layer has such a factor; the first one is named.
    """
    for name, (groups, outputs, inputs) in shapes.items():
        side = max(outputs, inputs)
        if side > max_factor:
            raise CoverageError(
                f"layer '{name}' needs a factor of {side} x {side} ({4 * groups * side**2 / _GIB:.2f} GiB), above "
                f"curvature.max_factor={max_factor}; raise curvature.max_factor, or give the layer a diagonal with "
                f"curvature.diagonal=['{name}']"
            )


# ---------------------------------------------------------------- growing sums


@dataclass(frozen=True)
class _Block:
    names: Mapping[str, str]
    a: InputMoment
    b: GradientMoment


@dataclass
class _Growing:
    """The accumulators of a pass."""

    coverage: Coverage
    blocks: dict[str, _Block]
    squares: dict[str, Tensor]
    count: float = 0.0
    layout: torch.memory_format | None = None  # of the pixels; None before the first part

    def laid(self, model: nn.Module, part: Examples) -> Examples:
        """Return the part with pixels in the model's fastest memory format."""
        self.layout = self.layout or fastest_layout(model, part.pixels)
        return replace(part, pixels=part.pixels.contiguous(memory_format=self.layout))

    def add(self, squares: Mapping[str, Tensor]) -> None:
        for name, value in squares.items():
            self.squares[name] += value

    def sums(self) -> dict[str, Tensor]:
        """A number for each parameter, not finite if its sum is not."""
        found = {name: value.sum() for name, value in self.squares.items()}
        return found | {block.names["weight"]: block.a.trace() + block.b.trace() for block in self.blocks.values()}

    def finite(self) -> bool:
        sums = list(self.sums().values())
        return not sums or bool(torch.stack(sums).isfinite().all())

    def measured(self, device: torch.device) -> Measured:
        """Turn the accumulators into sums, freeing each one as soon as its matrix exists."""
        blocks = {}
        for name in list(self.blocks):
            block = self.blocks.pop(name)
            blocks[name] = BlockSums(block.names["weight"], block.names.get("bias"), block.a.matrix(), block.b.matrix())
        count = torch.tensor([self.count], dtype=torch.float64, device=device)
        return Measured(blocks, self.squares, count)


def _allocated(model: nn.Module, name: str, names: Mapping[str, str], sharing: Sharing) -> _Block:
    module = model.get_submodule(name)
    try:
        return _Block(
            names, InputMoment(module, bias="bias" in names, sharing=sharing), GradientMoment(module, sharing=sharing)
        )
    except RuntimeError as error:  # torch raises it, or a subclass, when memory runs out
        groups, outputs, inputs = _shape(model, name, names)
        gib = 4 * groups * (outputs**2 + inputs**2) / _GIB
        raise CoverageError(
            f"out of memory for the factors of layer '{name}' ({outputs} x {outputs} and {inputs} x {inputs}, "
            f"{gib:.2f} GiB); lower curvature.max_factor, or give the layer a diagonal: curvature.diagonal=['{name}']"
        ) from error


def _shape(model: nn.Module, name: str, names: Mapping[str, str]) -> Shape:
    return block_shape(model.get_submodule(name), bias="bias" in names)


def _outer_zeros(qa: Tensor, qb: Tensor) -> Tensor:
    return torch.zeros(len(qa), qb.shape[1], qa.shape[1], dtype=torch.float32, device=qa.device)


def _trained(module: nn.Module) -> list[str]:
    return [name for name, value in module.named_parameters(recurse=False) if value.requires_grad]


def _refuse_idle_patterns(model: nn.Module, patterns: Iterable[str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"curvature.diagonal={pattern!r} matches no linear map or convolution (other layers are diagonal "
                f"anyway); allowed: {listed(names)}, or patterns with * and ?"
            )


def _fitting(graph_bytes: int, examples: Examples) -> int:
    """Return how many examples to hold at a time."""
    return fitting(examples, graph_bytes, working_bytes(examples.pixels.device))
