"""Soft labels are in one file that all ranks map: the same for any number of them, and next to nothing in each."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.memory.store import DTYPES, Memory, head_columns
from hpccl.train.soft_labels import write_soft_labels
from tests.dist.world import Result, run_in_world
from tests.run.method import make_world, merged

ROWS, CLASSES, HEADS = 40_000, 100, [tuple(range(100))]


def anonymous() -> int:
    """Bytes of this process that are no file's: what another process cannot share and the system cannot drop."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = re.findall(r"Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(line) * 1024


def labels_of(rows: range, dtype: str) -> Tensor:
    """[rows, CLASSES] of some examples, the same whoever makes them."""
    row = torch.arange(rows.start, rows.stop)[:, None]
    return torch.sin(row * 37.0 + torch.arange(CLASSES) * 11.0).to(DTYPES[dtype])


def labelled(comm: Comm, folder: str, dtype: str) -> Result:
    """A memory of which every rank made its share of the soft labels, and some of them after many recalls."""
    _, world = make_world(merged({"memory": {"size": 20}}), Path(folder) / f"{comm.size}-{dtype}", comm)
    numbers = torch.arange(ROWS)
    memory = Memory.empty().admit(task=0, sample=numbers, label=numbers % CLASSES, replay=torch.zeros(ROWS).bool())
    before = anonymous()
    file, soft = write_soft_labels(world.stream.tasks[0], labels_of(comm.share(ROWS), dtype), world)
    memory = memory.mapped(soft, head_columns(HEADS), file)
    random = torch.Generator().manual_seed(3)
    target = memory.soft_targets(numbers[:1000], temperature=2.0, num_classes=CLASSES)[0]
    for _ in range(100):  # nearly every row
        slots = torch.randint(ROWS, (1000,), generator=random)
        target, _ = memory.soft_targets(slots, temperature=2.0, num_classes=CLASSES)
    grown = anonymous() - before
    return {
        "grown": grown,
        "bytes": memory.soft_bytes,
        "target": target,
        "soft": memory.soft.clone(),
        "path": file.path,
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_file_for_all_ranks(tmp_path: Path, dtype: str) -> None:
    (alone,) = run_in_world(labelled, 1, tmp_path, str(tmp_path), dtype)
    assert torch.equal(alone["soft"], labels_of(range(ROWS), dtype))
    for size in (2, 4):
        for found in run_in_world(labelled, size, tmp_path, str(tmp_path), dtype):
            assert torch.equal(found["soft"], alone["soft"])
            assert torch.equal(found["target"], alone["target"])
            assert found["path"] == alone["path"]  # named by what is in it
            assert found["bytes"] == ROWS * CLASSES * (4 if dtype == "fp32" else 2)
            assert found["grown"] < found["bytes"] / 5
