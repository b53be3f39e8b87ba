"""On one engine and number of ranks, a run that was stopped ends bit for bit where an undisturbed one ends."""

from pathlib import Path

import pytest
import torch

from tests.dist.test_engines import ENGINES, half, rest
from tests.dist.world import dismiss, run_in_world


@pytest.mark.parametrize(
    "name", ["fsdp2", *(pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(4))]
)
def test_stopped_and_ended_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Three ranks: sums of two do not depend on their order."""
    dismiss()
    changes = {"engine": ENGINES[name]}
    undisturbed = run_in_world(rest, 3, tmp_path / "one", str(tmp_path / "whole"), changes)[0]
    stopped = run_in_world(half, 3, tmp_path / "two", str(tmp_path / "run"), changes)[0]
    dismiss()  # as a killed process would, the new one begins with nothing
    ended = run_in_world(rest, 3, tmp_path / "three", str(tmp_path / "run"), changes)[0]
    assert 0 < stopped["step"] < ended["step"] == undisturbed["step"]
    differing = [
        name for name, value in undisturbed["weights"].items() if not torch.equal(value, ended["weights"][name])
    ]
    assert differing == []
