"""The same numbers from two other derivations: a dense matrix by torch.func, and curvlinops' operators."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hpccl.curvature.columns import Fisher
from hpccl.curvature.diagonal import DiagonalEstimator
from hpccl.dist.comm import Comm
from tests.unit.curvature.oracle import NUM_CLASSES, build, examples

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # a library of curvlinops scripts its functions on import
    from curvlinops import EFLinearOperator, GGNLinearOperator

EVERY_CLASS = tuple(range(NUM_CLASSES))


@pytest.mark.parametrize("name", ["mlp", "norms", "wrapped"])
def test_dense_matrix(name: str) -> None:
    model, pixels = build(name, 4)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def logits(named: dict[str, Tensor], image: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, named, (image[None],))
        return out[0]

    size = sum(value.numel() for value in parameters.values())
    dense = torch.zeros(size, size, dtype=torch.float64)
    for image in pixels:
        by_name = torch.func.jacrev(logits)(parameters, image)
        jacobian = torch.cat([by_name[key].flatten(1) for key in parameters], dim=1)
        p = logits(parameters, image).softmax(0).detach()
        dense += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    found = DiagonalEstimator().estimate(model, [examples(pixels, classes=EVERY_CLASS)], Comm.solo())
    flat = torch.cat([found.values[key].flatten() for key in parameters]).double()
    torch.testing.assert_close(flat, dense.diagonal(), rtol=1e-5, atol=1e-6 * float(dense.diagonal().max()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(("fisher", "operator"), [("ggn", GGNLinearOperator), ("empirical", EFLinearOperator)])
def test_curvlinops(fisher: Fisher, operator: type) -> None:
    model, pixels = build("convs", 4)
    data = examples(pixels, classes=EVERY_CLASS)
    parameters = list(model.parameters())
    matrix = operator(model, nn.CrossEntropyLoss(reduction="sum"), parameters, [(data.pixels, data.labels)])
    dense = matrix @ torch.eye(sum(value.numel() for value in parameters), dtype=torch.float64)
    found = DiagonalEstimator(fisher).estimate(model, [data], Comm.solo())
    flat = torch.cat([value.flatten() for value in found.values.values()]).double()
    torch.testing.assert_close(flat, dense.diagonal(), rtol=1e-5, atol=1e-6 * float(flat.max()))
