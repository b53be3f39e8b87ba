"""Memory Aware Synapses, the local variant: how much a small change of a weight changes its own layer's output.

    Omega = mean_i |d |y_i|^2 / d theta|          y: the output of theta's layer, the layer's input held constant

(Hebbian: for y = phi(W x), phi ReLU, Omega_ij = mean_k 2 |y_i x_j|). Labels are not used; absolute values are taken per
example. As in the global variant, DiagonalEstimator("outputs"), the precision is 2 sum_i |..|, a sum over examples.
Source: Aljundi et al. 2018, "Memory Aware Synapses: Learning what (not) to forget", ECCV.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm

from hpccl.curvature.capture import captured, working_bytes
from hpccl.curvature.coverage import Coverage, refuse_unfit
from hpccl.curvature.diagonal import Diagonal, accumulated, measured_parts
from hpccl.curvature.layers import has_formula, squares
from hpccl.curvature.protocols import Examples
from hpccl.curvature.sweep import fitting
from hpccl.dist.comm import Comm
from hpccl.engine.sharded import entered, whole_layer
from hpccl.errors import CoverageError, DivergedError

__all__ = ["LocalMasEstimator"]

# Elementwise modules: the output of a layer is taken behind these.
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign),
)


@final
@dataclass(frozen=True)
class LocalMasEstimator:
    """Measures 2 n Omega of the local variant by a forward pass and each activation's own derivative.

    A layer's output is taken behind the BatchNorm (in evaluation mode a part of the layer) and the activation modules
    that it feeds directly. An activation that is a function and not a module is not seen.
    """

    known: Coverage | None = None

    def check(self, model: nn.Module) -> None:
        """See Estimator.check."""
        refuse_unfit(model)

    def estimate(self, model: nn.Module, batches: Iterable[Examples], comm: Comm) -> Diagonal:
        """See Estimator.estimate. fp32 sums; one exchange between ranks at the end, besides those of passes in shards.

        Raises:
            CoverageError: a trainable parameter has no layer that is called once per pass.
            DivergedError: an output is not finite.
            WorldError: any of these on another rank.
        """
        parts = measured_parts(model, batches, comm, self.known, size=_fits, measure=_hebbian)
        return accumulated(model, parts, comm).times(2.0)


@dataclass
class _Said:
    """By layer: the graph edge of its output y, 2 y, and dy / da for the layer's own output a, if y is behind it.

    The modules that follow a layer are elementwise, so this derivative has one number per element.
    """

    edges: dict[str, GradientEdge] = field(default_factory=dict)
    doubled: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, name: str, out: Tensor) -> None:
        """Record the output of layer `name`, as a copy, since later modules may change it in place."""
        self.edges[name], self.doubled[name] = get_gradient_edge(out), 2 * out.detach()

    def go_on(self, name: str, out: Tensor, slope: Tensor) -> None:
        """Replace the output of layer `name` by `out`, an elementwise function of it with derivative `slope`."""
        self.slopes[name] = slope * self.slopes[name] if name in self.slopes else slope
        self.begin(name, out)

    def gradient(self, name: str) -> Tensor:
        """Return the gradient d |y|^2 / da, in a's shape."""
        doubled = self.doubled[name]
        return doubled * self.slopes[name] if name in self.slopes else doubled

    def by(self, value: Any) -> list[str]:
        """Return the layers whose output is `value`, by its graph edge, which in-place operations change."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return []
        edge = entered(get_gradient_edge(value))
        return [name for name, said in self.edges.items() if _same(said, edge)]


def _fits(coverage: Coverage, examples: Examples) -> int:
    """Return how many examples to hold at a time; raise CoverageError if a parameter has no layer of its own."""
    _refuse_free(coverage)
    each = coverage.graph_bytes + 2 * coverage.output_bytes
    return fitting(examples, each, working_bytes(examples.pixels.device) // 2)


def _refuse_free(coverage: Coverage) -> None:
    free = [*coverage.mapped, *coverage.looped]
    if free:
        raise CoverageError(
            f"parameter '{free[0]}' ({len(free)} in all) belongs to no layer that is called once per image, which "
            "curvature.variant=local needs; use curvature.variant=global, which covers it"
        )


def _hebbian(model: nn.Module, coverage: Coverage, part: Examples) -> Mapping[str, Tensor]:
    """Sum |d |y|^2 / d theta| over examples, by full name.

    All layers are measured before an error is raised: in shards, other ranks wait for this one at layers without a
    formula.
    """
    total: dict[str, Tensor] = {}
    diverged: str | None = None
    with captured(model, coverage.layers) as calls, _listening(model, coverage.layers) as said:
        model(part.pixels)
    for name, names in coverage.layers.items():
        (call, *_) = calls[name]
        grad = _weighted(said.gradient(name), part)[:, None]
        layer = model.get_submodule(name)
        with nullcontext() if has_formula(layer) else whole_layer(model, name):  # a formula needs no weights
            found = squares(layer, call.inputs, grad, names, len(part), power=1)
        for local, value in found.items():
            if diverged is None and not bool(value.sum().isfinite()):
                diverged = name
            total[names[local]] = value
    if diverged is not None:
        raise DivergedError(
            f"the output of layer '{diverged}' is not finite on an image; curvature needs a model that has not diverged"
        )
    return total


def _same(one: GradientEdge, other: GradientEdge) -> bool:
    return one.node is other.node and one.output_nr == other.output_nr


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    """Return an elementwise module's derivative, in x's shape; outside the graph, where shards have training hooks."""
    leaf = x.requires_grad_()
    out: Tensor = module.forward(leaf.clone())
    (slope,) = torch.autograd.grad([out], [leaf], [torch.ones_like(out)])
    return slope


def _weighted(grad: Tensor, part: Examples) -> Tensor:
    rows = part.weight.to(grad).repeat_interleave(len(grad) // len(part))
    return grad * rows.view(-1, *[1] * (grad.dim() - 1))


@contextmanager
def _listening(model: nn.Module, layers: Collection[str]) -> Iterator[_Said]:
    """Follow each layer's output through the BatchNorm and activation modules that it feeds directly."""
    said, heard = _Said(), dict[nn.Module, tuple[list[str], Tensor | None]]()

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        names = said.by(arguments[0]) if arguments else []
        heard[module] = names, arguments[0].detach().clone() if names else None  # it may change its input in place

    def leave(module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        names, x = heard.pop(module)
        if x is None or not isinstance(out, Tensor) or not out.requires_grad:
            return
        slope = _slope(module, x)
        for name in names:
            said.go_on(name, out, slope)

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
            said.begin(name, out)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (*_ACTIVATIONS, _BatchNorm)):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, prepend=True).remove)  # while its weights are whole
            if name in layers:  # later than `leave`: a norm ends another layer's chain and begins its own
                stack.callback(module.register_forward_hook(begin(name)).remove)
        yield said
