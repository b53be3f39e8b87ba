"""Whole selections, network and all, on every engine and number of processes: one memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hpccl.dist.comm import Comm
from hpccl.memory.store import Memory
from hpccl.train.consolidate import select
from hpccl.train.soft_labels import relabel
from tests.dist.test_engines import ENGINES, VIT
from tests.dist.world import Result, dismiss, run_in_world
from tests.run.method import make_world, merged

SECTIONS: dict[str, Any] = {
    "model": {"kind": "timm", "name": "vit_tiny_patch16_224", "options": VIT},
    "prior": {"replay": 0.4, "quadratic": {"weight": 3.0}},
}
SELECTORS: list[dict[str, Any]] = [
    {"kind": "gini"},
    {"kind": "error", "sampled": True},
    {"kind": "leverage"},
    {"kind": "sensitivity", "sampled": True},
    {"kind": "leverage", "network": "all"},
    {"kind": "herding"},
    {"kind": "k_center"},
    {"kind": "reconstruction", "weights": "fitted"},
    {"kind": "reconstruction"},
    {"kind": "welling"},
]


def selections(comm: Comm, folder: str, engine: dict[str, Any]) -> Result:
    """The memory after a task of each selector, for one network that was not trained."""
    found: Result = {}
    for number, selector in enumerate(SELECTORS):
        memory = {"size": 21, "selector": selector, "balanced": number % 2 == 0, "dtype": "fp16"}
        config = merged(SECTIONS, {"memory": memory, "engine": engine})
        state, world = make_world(config, Path(folder) / f"{number}", comm)
        task = world.stream.tasks[0]
        kept = relabel(task, select(task, Memory.empty(), state, world), state, world)
        found[" ".join(map(str, selector.values()))] = kept.tensors()
    return found


@pytest.mark.parametrize(
    ("engine", "sizes"), [("ddp", (2, 4)), ("fsdp2", (2,)), ("zero-3", (2,))], ids=["ddp", "fsdp2", "zero-3"]
)
def test_one_memory(tmp_path: Path, engine: str, sizes: tuple[int, ...]) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    one = run_in_world(selections, 1, tmp_path / "one", str(tmp_path / "one"), {"kind": "ddp"})[0]
    for size in sizes:
        folder = tmp_path / f"{engine}-{size}"
        for rank in run_in_world(selections, size, folder, str(folder), ENGINES[engine]):
            for selector, expected in one.items():
                found = rank[selector]
                for name in ("sample", "label", "replay", "order", "heads"):
                    assert torch.equal(found[name], expected[name]), (selector, name)
                torch.testing.assert_close(found["weight"], expected["weight"], rtol=2e-3, atol=2e-3)
                torch.testing.assert_close(found["soft"], expected["soft"], rtol=1e-2, atol=1e-2)
    if engine.startswith("zero"):
        dismiss()
