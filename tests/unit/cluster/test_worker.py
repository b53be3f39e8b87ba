from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpccl.cluster import worker
from hpccl.cluster.outcome import code_of, tell
from hpccl.cluster.prepare import prepare
from hpccl.config.load import load
from hpccl.errors import ConfigError, DataError
from hpccl.train.stop import Stop


def test_a_signal_asks_to_stop_and_former_handlers_return() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGUSR2)
    with worker._listening(stop):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.reason == "signal SIGUSR2"
        os.kill(os.getpid(), signal.SIGTERM)  # once more does no harm
    assert stop.reason == "signal SIGUSR2"
    assert signal.getsignal(signal.SIGUSR2) == before


def test_the_first_interrupt_asks_and_the_second_stops() -> None:
    stop = Stop()
    with worker._listening(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "signal SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_error_is_told_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(DataError("no such image")) == 1
    assert code_of(ConfigError("wrong")) == 2
    assert capsys.readouterr().err == "error: no such image\n"


def test_a_run_in_this_process_returns_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Larger than a task of the digits: known only once the data is there.
    config = load([], [f"folder={tmp_path}", "memory.size=100000", "log.quiet=true"])
    assert worker.main(config, ["test"]) == 2
    assert capsys.readouterr().err.startswith("error: memory.size=100000 is larger than task")


def test_a_run_whose_folder_was_taken_over_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between the moment that it was prepared and the one at which it had the lock."""
    settings = [f"folder={tmp_path}", "memory.size=100000", "log.quiet=true"]
    prepare(load([], [*settings, "seed=2"]), ["test"])
    assert worker.main(load([], settings), ["test"]) == 1
    assert "seed: 2 there, 0 here" in capsys.readouterr().err
    assert not (tmp_path / "events.jsonl").exists()


def test_a_rank_leaves_word_of_a_wrong_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sed: 1\n")
    line, end = os.pipe()
    command = [sys.executable, "-m", "hpccl.cluster.worker", str(path), "hpccl", "train"]
    environment = {**os.environ, "HPCCL_ERROR_PIPE": str(end)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False, pass_fds=(end,)
    )
    os.close(end)
    assert (done.returncode, done.stderr) == (2, "")
    with open(line, "rb") as pipe:
        left = json.load(pipe)
    assert left["kind"] == "ConfigError"
    assert "did you mean 'seed'" in left["message"]
