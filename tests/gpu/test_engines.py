"""What tests/dist shows of engines on CPUs, on CUDA devices: training, pull, curvature, memory, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_engines import (
    ENGINES,
    OFFLOAD,
    RESTORED,
    VARIANTS,
    agree,
    assert_ended_alike,
    consolidated,
    half,
    rest,
    two_tasks,
)
from tests.dist.world import Result
from tests.gpu.world import run_on_devices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

SIZES = [
    1,
    pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")),
]
SHARDED = ["fsdp2", "zero-1", "zero-3"]


def trained(tmp_path: Path, size: int, name: str, changes: dict[str, Any]) -> Result:
    """Of rank 0; all ranks have the same."""
    first, *others = run_on_devices(two_tasks, size, tmp_path / name, str(tmp_path / f"{name}-runs"), changes)
    for other in others:
        assert all(torch.equal(other["weights"][key], value) for key, value in first["weights"].items())
    return first


def test_a_device_computes_what_a_processor_does(tmp_path: Path) -> None:
    found = trained(tmp_path, 1, "cuda", {"engine": ENGINES["ddp"]})
    (expected,) = run_on_devices(
        two_tasks, 1, tmp_path / "cpu", str(tmp_path / "runs"), {"engine": ENGINES["ddp"]}, device="cpu"
    )
    agree(found, expected, 1e-4, accuracy=0.02)


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("size", SIZES)
def test_engines_agree(tmp_path: Path, size: int, name: str) -> None:
    expected = trained(tmp_path, size, "ddp", {"engine": ENGINES["ddp"]})
    found = trained(tmp_path, size, name, {"engine": ENGINES[name]})
    agree(found, expected, 1e-5, accuracy=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["fsdp2", "zero-3"])
def test_every_curvature(tmp_path: Path, name: str, variant: str) -> None:
    size = min(torch.cuda.device_count(), 2)
    expected = trained(tmp_path, size, "ddp", {**VARIANTS[variant], "engine": ENGINES["ddp"]})
    found = trained(tmp_path, size, name, {**VARIANTS[variant], "engine": ENGINES[name]})
    agree(found, expected, 1e-5, accuracy=0.02)


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("size", SIZES)
def test_bf16_keeps_fp32_weights(tmp_path: Path, size: int, name: str) -> None:
    expected = trained(tmp_path, size, "ddp", {"engine": {**ENGINES["ddp"], "precision": "bf16"}})
    found = trained(tmp_path, size, name, {"engine": {**ENGINES[name], "precision": "bf16"}})
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}
    agree(found, expected, 1e-3, accuracy=0.05)


@pytest.mark.parametrize("name", OFFLOAD)
def test_shards_in_host_memory(tmp_path: Path, name: str) -> None:
    size = min(torch.cuda.device_count(), 2)
    expected = trained(tmp_path, size, "ddp", {"engine": ENGINES["ddp"]})
    found = trained(tmp_path, size, name, {"engine": OFFLOAD[name]})
    agree(found, expected, 1e-5, accuracy=0.02)


KEPT_BESIDE: dict[str, dict[str, Any]] = {
    "the path": {"curvature": {"kind": "si"}, "prior": {"quadratic": {"weight": 0.1, "decay": 0.9}}},
    "draws": {"optim": {"kind": "ivon", "lr": 0.1, "initial_curvature": 0.1, "curvature_decay": 0.99, "samples": 2}},
}


@pytest.mark.parametrize("kept", KEPT_BESIDE)
@pytest.mark.parametrize("name", OFFLOAD)
def test_what_goes_with_shards_in_host_memory(tmp_path: Path, name: str, kept: str) -> None:
    size = min(torch.cuda.device_count(), 2)
    expected = trained(tmp_path, size, "ddp", {**KEPT_BESIDE[kept], "engine": ENGINES["ddp"]})
    found = trained(tmp_path, size, name, {**KEPT_BESIDE[kept], "engine": OFFLOAD[name]})
    agree(found, expected, 1e-4, accuracy=0.02)


@pytest.mark.parametrize("name", ["ddp", *SHARDED])
def test_recomputing_changes_nothing(tmp_path: Path, name: str) -> None:
    size = min(torch.cuda.device_count(), 2)
    expected = trained(tmp_path, size, "plain", {"engine": ENGINES["ddp"]})
    found = trained(tmp_path, size, name, {"engine": {**ENGINES[name], "recompute": True}})
    agree(found, expected, 1e-5, accuracy=0.02)


@pytest.mark.parametrize("what", RESTORED)
@pytest.mark.parametrize("name", OFFLOAD)
def test_shards_in_host_memory_meet_what_was_read_from_a_checkpoint(tmp_path: Path, name: str, what: str) -> None:
    """Which is on the device."""
    changes = {"log": {"every": 1, "reconstruction": 0.1}, **RESTORED[what], "engine": OFFLOAD[name]}
    folder = str(tmp_path / "run")
    (stopped,) = run_on_devices(half, 1, tmp_path / "half", folder, changes)
    (ended,) = run_on_devices(consolidated, 1, tmp_path / "rest", folder, changes)
    assert 0 < stopped["step"] < ended["step"]
    (undisturbed,) = run_on_devices(consolidated, 1, tmp_path / "one", str(tmp_path / "whole"), changes)
    assert_ended_alike(ended, undisturbed)


PAIRS = [("ddp", "fsdp2"), ("fsdp2", "zero-3"), ("zero-3", "zero-1"), ("zero-1", "ddp")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("size", SIZES)
def test_stopped_on_one_engine_and_ended_on_another(tmp_path: Path, size: int, first: str, second: str) -> None:
    """The first on one device, written in the background; the second on `size`."""

    def part(world: str, run: Any, count: int, name: str) -> Result:
        changes = {"engine": ENGINES[name], "checkpoint": {"background": run is half}}
        return run_on_devices(
            run, count, tmp_path / f"{world}-{run.__name__}", str(tmp_path / f"{world}-run"), changes
        )[0]

    undisturbed = part("whole", rest, 1, "ddp")
    stopped = part("cut", half, 1, first)
    ended = part("cut", rest, size, second)
    assert 0 < stopped["step"] < ended["step"] == undisturbed["step"]
    a = torch.cat([value.double().flatten() for value in undisturbed["weights"].values()])
    b = torch.cat([ended["weights"][name].double().flatten() for name in undisturbed["weights"]])
    assert float((a - b).norm() / a.norm()) <= 1e-4
