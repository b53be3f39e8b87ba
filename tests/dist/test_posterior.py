from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.config.curvature import ListedTasks
from hpccl.curvature.blocks import WHOLE, Block, Layout
from hpccl.curvature.diagonal import Diagonal
from hpccl.curvature.kronecker import Kronecker, layout_parts
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.spectrum import gathered
from hpccl.dist.comm import Comm
from hpccl.errors import HpcclError
from hpccl.kron.eigen import Eigen
from hpccl.kron.factor import Dense
from hpccl.kron.pair import Pair
from tests.dist.world import run_in_world
from tests.unit.curvature.oracle import NUM_CLASSES, build

LAYOUTS = (Layout("1", "1.weight", "1.bias", (9, 18)), Layout("3", "3.weight", "3.bias", (NUM_CLASSES, 9)))


def precision(comm: Comm, *, eigen: bool) -> Kronecker:
    """Of the `mlp`, as the ranks would hold it; its first layer is dearer than half of the whole, and is cut."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for layout, ranks in layout_parts(LAYOUTS, comm, divisible=not eigen):
        a, b = (torch.randn(1, size, size, generator=generator) for size in layout.shape[:0:-1])
        term = Pair(Dense(a @ a.mT), Dense(b @ b.mT))
        whole = Block(layout, (Eigen.of(term) if eigen else term,), (3.0,), lost=0.25)
        blocks += [whole.cut(part) for rank, part in ranks if rank == comm.rank]
    return Kronecker(tuple(blocks), Diagonal({"free": torch.ones(5)}), 3.0, ListedTasks(), LAYOUTS, not eigen)


def everything(comm: Comm) -> dict[str, Any]:
    return {"pair": figures(comm, eigen=False), "eigen": figures(comm, eigen=True), "failed": failed(comm)}


def figures(comm: Comm, *, eigen: bool) -> dict[str, Any]:
    model, pixels = build("mlp", 2, dtype=torch.float32)
    model.register_parameter("free", torch.nn.Parameter(torch.ones(5), requires_grad=False))
    own = precision(comm, eigen=eigen)
    mean = {name: value.detach() for name, value in model.state_dict().items()}
    posterior = Posterior.of(own, mean, prior_precision=0.5, comm=comm)
    best = posterior.best_prior_precision()
    together = gathered(own, comm)
    assert all(block.part == WHOLE for block in together.blocks)
    again = Posterior.of(together, mean, prior_precision=0.5, comm=comm)
    alone = Posterior.of(together, mean, prior_precision=0.5)
    return {
        "cut": comm.any(any(block.part != WHOLE for block in own.blocks)),
        "layers": len(posterior.spectra),
        "trace": sum(block.trace() for block in together.blocks),
        "error": together.blocks[0].lost,
        "solve": posterior.solve(mean),
        "sample": posterior.sample(3, 1),
        "evidence": posterior.log_evidence(7.0),
        "best": best,
        "best again": again.best_prior_precision(),
        "best alone": alone.best_prior_precision(),
        "variance": posterior.logit_variance(model, pixels),
    }


def failed(comm: Comm) -> dict[str, Any]:
    """The owner of the last layer has a factor that is not finite; then none has the layers of another world."""
    own = precision(comm, eigen=False)
    (pair,) = own.blocks[-1].terms
    assert isinstance(pair, Pair)
    if own.blocks[-1].layout.name == "3":
        spoilt = replace(own.blocks[-1], terms=(Pair(pair.a, Dense(torch.full((1, 7, 7), torch.nan))),))
        own = replace(own, blocks=(*own.blocks[:-1], spoilt))
    mean = {name: value.detach() for name, value in build("mlp", 1)[0].state_dict().items()} | {"free": torch.ones(5)}
    return {"spoilt": message(own, mean, comm), "alone": message(own, mean, Comm.solo())}


def message(own: Kronecker, mean: dict[str, torch.Tensor], comm: Comm) -> str:
    try:
        Posterior.of(own, mean, prior_precision=1.0, comm=comm)
    except HpcclError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("size", [2])
def test_world_size_does_not_matter(tmp_path: Path, size: int) -> None:
    (alone,) = run_in_world(everything, 1, tmp_path)
    ranks = run_in_world(everything, size, tmp_path)
    for kind in ("pair", "eigen"):
        assert [rank[kind]["cut"] for rank in ranks] == [kind == "pair"] * size
        assert sum(rank[kind]["layers"] for rank in ranks) == alone[kind]["layers"] == 3
        for rank in ranks:
            found, expected = rank[kind], alone[kind]
            for name in ("solve", "sample"):
                for weight, value in expected[name].items():
                    torch.testing.assert_close(found[name][weight], value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["variance"], expected["variance"], rtol=1e-4, atol=1e-4)
            for name in ("trace", "evidence", "best", "best again", "best alone"):
                assert found[name] == pytest.approx(expected["best" if "best" in name else name], rel=1e-5)
            assert found["error"] == 0.25
    for name in ("best", "evidence"):
        assert len({rank["pair"][name] for rank in ranks}) == 1
    failures = sorted(rank["failed"]["spoilt"].split(":")[0] for rank in ranks)
    assert failures == ["DivergedError", "WorldError"]
    assert all(rank["failed"]["alone"].startswith("CoverageError: this rank has no curvature of") for rank in ranks)
