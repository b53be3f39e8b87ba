"""A real SLURM cluster of three nodes for the tests of this folder, which ends with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.testbed.testbed import Settings, Testbed, obstacle

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in this folder is marked `slurm`, and skipped, visibly, where there can be no cluster."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = obstacle() if ours else None
    for item in ours:
        item.add_marker("slurm")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _first_job() -> int:
    """Each process of pytest has a cluster of its own, and a rank is found by the number of its job."""
    return 1 + 10000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture(scope="session")
def _testbed(request: pytest.FixtureRequest) -> Iterator[Testbed]:
    directory = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))  # short, for unix sockets
    with (
        pytest.MonkeyPatch.context() as patch,
        Testbed(directory, Settings(nodes=3, overrides=(f"FirstJobId={_first_job()}",))) as testbed,
    ):
        for name in os.environ:
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
                patch.delenv(name)
        patch.setenv("PATH", f"{directory}/hostbin:{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))  # this checkout, wherever `hpccl` was installed from
        patch.setenv("HPCCL_HOME", str(ROOT))
        yield testbed
    if request.session.testsfailed:
        sys.stderr.write(f"the cluster's logs are in {directory}/log\n")
    else:
        shutil.rmtree(directory)


@pytest.fixture
def cluster(_testbed: Testbed) -> Iterator[Testbed]:
    """Three idle nodes n1, n2, n3; sbatch and the others are in PATH. Afterwards all is cancelled and mended."""
    yield _testbed
    if not _testbed.processes()["slurmctld"][1]:
        _testbed.start_controller()
    subprocess.run(["scancel", "--user=root", "--full"], check=True)
    _testbed.mend()
