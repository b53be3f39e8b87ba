"""What a result was made on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hpccl.machine import ask_git, commit, usable_cores, visible_gpus


def test_usable_cores_are_at_least_one_and_at_most_all() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_gpus_that_are_listed_are_all_that_there_are() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-8f"}) == ["3", "GPU-8f"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_slow_or_absent_git_costs_the_commit_and_not_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexec sleep 60\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: run(*command, **{**options, "timeout": 0.2}))
    assert ask_git(tmp_path, "status") is None
    assert commit().startswith("version ")
    git.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit().startswith("version ")
