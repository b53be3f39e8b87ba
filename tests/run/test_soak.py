"""Any process of a run is killed at any moment: one clear message, nothing is left behind, the same weights."""

from pathlib import Path

import pytest

from tests.run.soak import AIMS, SHORT, Setting, draw_aims, soak


def test_kills_while_it_saves_measures_and_tests(tmp_path: Path) -> None:
    result = soak(Setting(tmp_path, arguments=(*SHORT, "stream.tasks=2")), ["save", "consolidate", "evaluate"])
    assert len(result.kills) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nproc", [1, 2])
def test_twenty_kills(tmp_path: Path, nproc: int) -> None:
    result = soak(Setting(tmp_path, nproc), draw_aims(20, nproc), seed=nproc)
    print(result.summary())
    hit = result.summary()["phases"]
    assert len(result.kills) == 20
    assert {"train", "save", "consolidate", "evaluate"} <= hit.keys() <= AIMS.keys()
