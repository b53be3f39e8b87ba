"""What all tests share: one thread, no chance, real images where there are any."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]

hypothesis.settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("deterministic")


def pytest_configure() -> None:
    """One thread in this process and in those it starts, for tests run several processes on few cores.

    Set before anything imports torch or numpy, whose pools read it once.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["MPLBACKEND"] = "Agg"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what needs a device that is not there."""
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real image archives (cifar10.zip, ...): HPCCL_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("HPCCL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: '{folder}' is not a folder (set HPCCL_DATA)")
    return folder
