"""The processes that tests in this folder share end with the last of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.world import dismiss


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Other tests look at which processes there are."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        dismiss()
