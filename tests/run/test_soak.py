"""Any process of a run is killed at any moment: one clear message, nothing is left behind, the same weights."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run.command import ROOT, finish, hpccl, start
from tests.run.soak import AIMS, SHORT, Setting, draw_aims, soak


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_report_leaves_whole_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(start(folder, "train.epochs=1"))[0] == 0
    names = ("report.json", "report.md", "report.html")
    for name in names:
        (folder / name).write_text("old")
    began = time.monotonic()
    assert hpccl("report", str(folder))[0] == 0
    usual = time.monotonic() - began
    new = {name: (folder / name).read_text() for name in names}
    assert json.loads(new["report.json"])
    for name in names:
        (folder / name).write_text("old")
    seen = {name: set[str]() for name in names}
    for tenth in range(3, 13):
        process = subprocess.Popen([sys.executable, "-m", "hpccl.cli", "report", str(folder)], cwd=ROOT)
        time.sleep(usual * tenth / 10)
        process.kill()
        process.wait()
        for name in names:
            content = (folder / name).read_text()
            assert content == "old" or len(content) == len(new[name]), name
            seen[name].add("old" if content == "old" else "new")
    assert all(found == {"old", "new"} for found in seen.values()), "no kill came before the writing, or none after it"
