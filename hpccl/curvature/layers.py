"""Exact sums of squares (or absolute values) of one layer's per-example gradients, which make up the diagonal.

For example i and column j, a layer with input a and output gradient g (at rows and positions r) has the gradient

    Linear, Conv2d   dW_ij = sum_r g_ijr a_ir'      (a: patches of the input, per group)
    bias             db_ij = sum_r g_ijr
    norm weight      dw_ij = sum_r g_ijr * x_hat_ir (x_hat recomputed without the affine map: the weight may be 0)

and adds sum_ij (d.._ij)^2. Positions are summed before squaring; only with a single position is the sum of squares of
dW the product (G^2)'(A^2), and with few positions it is a sum of such products over pairs of them. For every other
layer the vector-Jacobian product of its own forward is taken per example. With power 1, |d.._ij| is added (MAS).

Legend: n examples, f rows of the layer's batch dim per example (windows), c columns, d inputs, o outputs.
Inputs are [n*f, ...], gradients [n*f, c, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Power",
    "Rotation",
    "acts_as_known",
    "has_formula",
    "output_size",
    "padded",
    "patches",
    "pieces",
    "raised",
    "squares",
]

Power = Literal[1, 2]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


def squares(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, names: Collection[str], n: int, *, power: Power = 2
) -> Mapping[str, Tensor]:
    """Sum squared gradients over examples and columns, by local parameter name, in the parameter's shape.

    Args:
        module: the layer.
        inputs: the arguments of its call, each [n*f, ...].
        grad: [n*f, c, ...] gradients of its output.
        names: which of its own parameters to measure.
        n: examples in the batch.
        power: 2 for squares, 1 for absolute values.
    """
    if not has_formula(module):
        return _any_layer(module, inputs, grad, names, n, power=power)
    (x,) = inputs
    summed = partial(_summed, power=power)
    if isinstance(module, nn.Linear):
        weight, bias = partial(_linear, x, grad, n, power), partial(summed, grad, n, -1)
    elif isinstance(module, nn.Conv2d):
        weight, bias = partial(_conv2d, module, x, grad, n, power), partial(summed, grad, n, 2)
    elif isinstance(module, nn.LayerNorm):
        width = prod(module.normalized_shape)
        scaled = (grad * _normalised(module, x)[:, None]).reshape(*grad.shape[:2], -1, width)
        weight = partial(summed, scaled, n, -1)
        bias = partial(summed, grad.reshape(*grad.shape[:2], -1, width), n, -1)
    else:
        weight = partial(summed, grad * _normalised(module, x)[:, None], n, 2)
        bias = partial(summed, grad, n, 2)
    by_name: dict[str, Callable[[], Tensor]] = {"weight": weight, "bias": bias}
    # Not `parameter.shape`: a weight in shards may not have its own shape at this moment.
    return {name: by_name[name]().view(_shape(module, name)) for name in names}


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter of a layer that has a formula."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape
    if isinstance(module, nn.Linear) and name == "weight":
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Conv2d) and name == "weight":
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return (-1,)


def _in_a_patch(module: nn.Conv2d) -> int:
    """Number of inputs that one output sees."""
    return module.in_channels // module.groups * prod(module.kernel_size)


@final
@dataclass(frozen=True)
class Rotation:
    """A layer's eigenbasis and its inputs of a batch, to rotate the gradients of one column after another.

    basis: Qa [groups, d, d], d one more than the weight's if the bias is the last input, and Qb [groups, o, o]
    inputs: slice of examples -> their inputs [m, groups, d, positions]
    before: whether inputs and gradients are rotated, rather than their product: whichever is cheaper
    kept: [n, groups, d, positions] the rotated inputs of all examples; None if every column rotates them again
    """

    module: nn.Module
    basis: tuple[Tensor, Tensor]
    num_examples: int
    inputs: Callable[[slice], Tensor]
    before: bool
    kept: Tensor | None

    @classmethod
    def of(
        cls, module: nn.Module, x: Tensor, basis: tuple[Tensor, Tensor], n: int, *, columns: int, room: int
    ) -> Rotation:
        """Prepare the rotation of an nn.Linear or nn.Conv2d.

        Args:
            module: the layer.
            x: [n*f, ...], its input.
            basis: (Qa, Qb).
            n: examples in the batch.
            columns: number of columns that will follow.
            room: elements of rotated inputs that may be cached.
        """
        qa, qb = basis
        groups, d, _ = qa.shape
        inputs, o = _example_inputs(module, x, n, d), qb.shape[1]
        positions = inputs(slice(0, 1)).shape[-1]
        shared = columns if n * groups * d * positions <= room else 1
        before = positions * (o * o + d * d / shared) < o * d * (o + d)
        kept = None
        if before and shared > 1:
            kept = x.new_empty(n, groups, d, positions)
            for some, _ in pieces(n, 1, 2 * groups * d * positions, x):
                torch.matmul(qa.mT, inputs(some), out=kept[some])
        return cls(module, basis, n, inputs, before, kept)

    def squares(self, grad: Tensor) -> Tensor:
        """Sum (Qb' dW Qa)^2 over examples for one column: [groups, o, d].

        grad: [n*f, ...], the gradient of the layer's output.
        """
        qa, qb = self.basis
        left = _example_gradients(self.module, grad, self.num_examples)
        total = grad.new_zeros(len(qa), qb.shape[1], qa.shape[1])
        positions = left.shape[-1]
        o, d = total.shape[1:]
        for some, _ in pieces(self.num_examples, 1, len(qa) * (2 * o * d + (o + 2 * d) * positions), grad):
            if self.before:
                total += _outer_squares((qb.mT @ left[some])[:, :, None], self._rotated(some))
            else:
                rotated: Tensor = qb.mT @ (left[some] @ self.inputs(some).mT) @ qa
                total += rotated.square_().sum(0)
        return total

    def _rotated(self, some: slice) -> Tensor:
        rotated: Tensor = self.basis[0].mT @ self.inputs(some) if self.kept is None else self.kept[some]
        return rotated


def has_formula(module: nn.Module) -> bool:
    """Whether the layer's forward is the one that its formula describes; subclasses often change it."""
    known = [kind for kind in (nn.Linear, nn.Conv2d, *_NORMS) if isinstance(module, kind)]
    if not known or "forward" in vars(module) or type(module).forward is not known[0].forward:
        return False
    if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    # Weight norm and pruning compute the weight from other parameters.
    return {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}


def acts_as_known(module: nn.Module) -> bool:
    """Whether it computes what nn.Linear or nn.Conv2d do, as some subclasses with their own forward do."""
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or has_formula(module):
        return isinstance(module, (nn.Linear, nn.Conv2d))
    if not {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}:
        return False
    # Two sizes reveal padding that depends on the size.
    return all(_computes_as_known(module, size) for size in (9, 16))


def _computes_as_known(module: nn.Linear | nn.Conv2d, size: int) -> bool:
    noise = torch.Generator().manual_seed(size)
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            x = torch.randn(2, module.in_features, generator=noise).to(module.weight)
            known = nn.Linear.forward(module, x)
        else:
            image = [size + apart * kernel for apart, kernel in zip(module.dilation, module.kernel_size, strict=True)]
            x = torch.randn(2, module.in_channels, *image, generator=noise).to(module.weight)
            known = nn.Conv2d.forward(module, x)
        try:
            found = module.forward(x)
        except (RuntimeError, TypeError, ValueError):
            return False
    if found.shape != known.shape:
        return False
    return bool((found - known).abs().max() <= 1e-4 * known.abs().max())


def raised(value: Tensor, power: Power) -> Tensor:
    """Return squares or absolute values. Not in place: a gradient may be an expanded view."""
    return value.square() if power == 2 else value.abs()


def _summed(terms: Tensor, n: int, dim: int, power: Power) -> Tensor:
    """Sum `terms` [n*f, c, ...] in each example over all dims but `dim`, and add up their squares: [size of dim]."""
    dim = dim % terms.dim()
    positions = [other for other in range(2, terms.dim()) if other != dim]
    per_row = terms.sum(positions) if positions else terms
    per_example: Tensor = per_row.unflatten(0, (n, -1)).sum(1)
    return raised(per_example, power).sum((0, 1))


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, None, None, module.eps)
    assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    if module.training:
        return functional.batch_norm(x, None, None, None, None, True, 0.0, module.eps)
    return functional.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)


def _linear(x: Tensor, grad: Tensor, n: int, power: Power) -> Tensor:
    """Squares of the weight, [o, d], for x [n*f, ..., d] and grad [n*f, c, ..., o]."""
    c, o, d = grad.shape[1], grad.shape[-1], x.shape[-1]
    rows = x.reshape(n, -1, d)
    positions = rows.shape[1]
    if positions == 1:
        return raised(grad.reshape(n, c, o), power).sum(1).T @ raised(rows[:, 0], power)
    outer = grad.reshape(n, -1, c, *grad.shape[2:]).movedim(2, 1).reshape(n, c, positions, o)
    total = x.new_zeros(o, d)
    for some, columns in pieces(n, c, _temporaries(c, o, d, positions, power), x):
        total += _outer_squares(outer[some, columns].mT[:, None], rows[some].mT[:, None], power)[0]
    return total


def _conv2d(module: nn.Conv2d, x: Tensor, grad: Tensor, n: int, power: Power) -> Tensor:
    """Squares of the weight, [groups, o / groups, d], for x [n*f, channels, h, w] and grad [n*f, c, o, h', w'].

    d: inputs in a patch
    """
    groups, c, o = module.groups, grad.shape[1], grad.shape[2] // module.groups
    d, height, width = _in_a_patch(module), grad.shape[3], grad.shape[4]
    view = patches(module, x)
    view = view.unflatten(0, (n, -1)).unflatten(2, (groups, -1))  # [n, f, groups, channels/groups, kh, kw, h', w']
    outer = grad.unflatten(0, (n, -1)).unflatten(3, (groups, -1))  # [n, f, c, groups, o, h', w']
    positions = view.shape[1] * height * width
    total = x.new_zeros(groups, o, d)
    for some, columns in pieces(n, c, groups * _temporaries(c, o, d, positions, power), x):
        left = outer[some, :, columns].permute(0, 3, 2, 4, 1, 5, 6).flatten(4)
        right = view[some].permute(0, 2, 3, 4, 5, 1, 6, 7).reshape(-1, groups, d, positions)
        total += _outer_squares(left, right, power)
    return total


def _example_gradients(module: nn.Module, grad: Tensor, n: int) -> Tensor:
    """Return [n, groups, o, positions], for grad [n*f, ..., o], or [n*f, channels, h', w'] of a convolution."""
    if not isinstance(module, nn.Conv2d):
        return grad.reshape(n, -1, grad.shape[-1]).mT[:, None]
    split: Tensor = grad.unflatten(0, (n, -1)).unflatten(2, (module.groups, -1))
    return split.permute(0, 2, 3, 1, 4, 5).flatten(3)


def _example_inputs(module: nn.Module, x: Tensor, n: int, size: int) -> Callable[[slice], Tensor]:
    """Return slice -> inputs [m, groups, size, positions], for x [n*f, ...]; a 1 is appended if size counts a bias."""

    def complete(a: Tensor) -> Tensor:
        return a if a.shape[2] == size else torch.cat([a, a.new_ones(*a.shape[:2], 1, a.shape[3])], dim=2)

    if not isinstance(module, nn.Conv2d):
        rows = x.reshape(n, -1, x.shape[-1])
        return lambda some: complete(rows[some].mT[:, None])
    groups, d = module.groups, _in_a_patch(module)
    view = patches(module, x).unflatten(0, (n, -1)).unflatten(2, (groups, -1))

    def taken(some: slice) -> Tensor:
        turned: Tensor = view[some].permute(0, 2, 3, 4, 5, 1, 6, 7)
        return complete(turned.reshape(len(turned), groups, d, -1))

    return taken


def _outer_squares(grad: Tensor, x: Tensor, power: Power = 2) -> Tensor:
    """Sum (sum_r g_r x_r')^2 over examples and columns: [groups, o, d].

    With few positions it is cheaper to sum over pairs of them, (g_r g_s summed over columns) (x_r x_s)': the columns
    then cost nothing, and no gradient is ever formed.

    Args:
        grad: [m, groups, c, o, positions].
        x: [m, groups, d, positions].
        power: 2; or 1 for absolute values, which pairs cannot give.
    """
    m, groups, c, o, positions = grad.shape
    if power == 1 or not _by_pairs(c, o, x.shape[2], positions):
        product = torch.bmm(grad.reshape(m * groups, c * o, positions), x.reshape(m * groups, -1, positions).mT)
        large = product.square_() if power == 2 else product.abs_()
        return large.view(m, groups, c, o, -1).sum((0, 2))
    one, other = torch.triu_indices(positions, positions, device=x.device)
    twice = (2 - (one == other).long()).to(x.dtype)
    grads = (grad[..., one] * grad[..., other]).sum(2)
    inputs = x[..., one] * x[..., other] * twice
    # Rounding may make a zero sum of squares slightly negative.
    return torch.einsum("mgop,mgdp->god", grads, inputs).clamp_(min=0)


def _by_pairs(c: int, o: int, d: int, positions: int) -> bool:
    """Whether pairs of positions are cheaper, in units of one multiply-add of a matrix product.

    Building a pair's factors costs about 200 per element, writing and reading a gradient 40 (measured with AVX-512).
    """
    pairs = positions * (positions + 1) // 2
    return pairs * (o * d + 200 * (c * o + 2 * d)) <= c * o * d * (positions + 40)


def _temporaries(c: int, o: int, d: int, positions: int, power: Power) -> int:
    """Elements that `_outer_squares` holds, per example, group and column."""
    if power == 2 and _by_pairs(c, o, d, positions):
        return positions * (positions + 1) // 2 * (2 * o + 2 * d // c + o // c + 1)
    return max(o * d, d * positions // c)


def padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad the input as the convolution does."""
    if module.padding_mode == "zeros" and isinstance(module.padding, tuple):
        return functional.pad(x, [pad for pad in reversed(module.padding) for _ in range(2)])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, list(module._reversed_padding_repeated_twice), mode=mode)


def output_size(module: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Return height and width of the convolution's output for the input x [..., h, w]."""
    around = module._reversed_padding_repeated_twice  # left, right, top, bottom
    height, width = (
        (size + pad - apart * (kernel - 1) - 1) // stride + 1
        for size, pad, apart, kernel, stride in zip(
            x.shape[-2:],
            (around[2] + around[3], around[0] + around[1]),
            module.dilation,
            module.kernel_size,
            module.stride,
            strict=True,
        )
    )
    return height, width


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """View the padded input as patches [rows, channels, kh, kw, h', w']: the pixels that each output position sees."""
    out = output_size(module, x)
    x = padded(module, x)
    rows, channels, down, right = x.stride()
    steps = (rows, channels, down * module.dilation[0], right * module.dilation[1])
    strides = (*steps, down * module.stride[0], right * module.stride[1])
    return x.as_strided((*x.shape[:2], *module.kernel_size, *out), strides, x.storage_offset())


def _any_layer(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, names: Collection[str], n: int, *, power: Power
) -> Mapping[str, Tensor]:
    """`squares` by per-example vector-Jacobian products of the layer's own forward."""
    own = {name: module.get_parameter(name).detach() for name in names}
    total = {name: torch.zeros_like(value) for name, value in own.items()}

    def one(arguments: tuple[Tensor, ...], columns: Tensor) -> Mapping[str, Tensor]:
        def forward(parameters: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(module, parameters, arguments)
            return out

        pull = torch.func.vjp(forward, own)[1]
        pulled: Mapping[str, Tensor] = torch.vmap(pull)(columns)[0]
        return pulled

    # Contiguous: some layers test for channels_last, which torch cannot do under vmap.
    folded = tuple(x.contiguous().unflatten(0, (n, -1)) for x in inputs)
    columns = grad.contiguous().unflatten(0, (n, -1)).transpose(1, 2).contiguous()  # [n, c, f, ...]
    size = sum(value.numel() for value in own.values()) + columns[0, 0].numel()
    for some, group in pieces(n, grad.shape[1], size, grad):
        pulled = torch.vmap(one)(tuple(x[some] for x in folded), columns[some, group])
        for name, value in pulled.items():
            total[name] += raised(value, power).sum((0, 1))
    return total


def pieces(n: int, c: int, size: int, like: Tensor, *, gpu_bytes: int = 1 << 28) -> Iterator[tuple[slice, slice]]:
    """Yield slices of examples and columns whose temporaries, [m, c', size] of `like`'s dtype, are small enough.

    Small enough to stay in a CPU's cache, or just large enough to keep a GPU busy; for one layer by default.
    """
    budget = 1 << 23 if like.device.type == "cpu" else gpu_bytes
    fits = max(1, budget // (like.element_size() * max(size, 1)))
    columns = min(max(c, 1), fits)
    examples = max(1, fits // columns)
    for first in range(0, n, examples):
        for column in range(0, c, columns):
            yield slice(first, first + examples), slice(column, column + columns)
