"""The doctor finds what is there, and says what to do about what is not."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hpccl import doctor
from hpccl.doctor import Check

ROOT = Path(__file__).parents[2]


def script(folder: Path, name: str, body: str) -> None:
    """Put a command on a PATH of its own."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_this_machine_can_train() -> None:
    checks = doctor.diagnose()
    assert doctor.ready(checks), [check for check in checks if check.status != "ok"]
    assert len({check.name for check in checks}) == len(checks)
    # Whoever is told that something is wrong is told what to do.
    assert all(check.advice for check in checks if check.status != "ok")
    assert json.loads(json.dumps(doctor.as_dict(checks)))["ready"] is True


def test_render_shows_every_check_as_it_is() -> None:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(doctor.render([Check("disk", "warn", "[red]1 GiB[/red] left", "free some [bold]")]))
    text = capture.get()
    assert "[red]1 GiB[/red] left" in text
    assert "free some [bold]" in text
    assert "warn" in text


def test_only_required_things_decide() -> None:
    assert doctor.ready([Check("deepspeed", "missing", "", "install"), Check("torch", "ok", "", required=True)])
    assert not doctor.ready([Check("torch", "missing", "", "install", required=True)])


def test_broken_torch_is_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    code = "import json; from hpccl import doctor; print(json.dumps(doctor.as_dict(doctor.diagnose())))"
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert report["ready"] is False
    assert "libcudart.so.13" in found["torch"]["found"]
    assert found["timm"]["status"] == found["devices"]["status"] == found["threads"]["status"] == "missing"


def test_occupied_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = doctor.check_port(port)
    assert check.status == "warn"
    assert str(port) in check.found
    assert "cluster.port=0" in check.advice


def test_free_and_impossible_ports() -> None:
    assert doctor.check_port(0).status == "ok"
    assert doctor.check_port(70000).status == "warn"


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    check = doctor.check_disk("disk", tmp_path / "new" / "folder")
    assert check.status in ("ok", "warn")
    assert str(tmp_path) in check.found


def test_disk_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = doctor.check_disk("disk", tmp_path / "file")
    assert check.status == "missing"
    assert check.required


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_disk_below_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir(mode=0o700)
    code = (
        "import os, sys; from pathlib import Path; from hpccl.doctor import check_disk; os.setuid(65534); "
        "print(check_disk('disk', Path(sys.argv[1])).status)"
    )
    place = str(tmp_path / "secret" / "cache" / "hpccl")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder.name.startswith(("pytest", tmp_path.name)):
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=True)
    assert done.stdout == "missing\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_disk_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor.check_disk("disk", tmp_path / "new").status == "missing"


def test_host_name_that_does_not_resolve() -> None:
    check = doctor.check_hostname("no-such-host.invalid")
    assert check.status == "warn"
    assert "GLOO_SOCKET_IFNAME" in check.advice
    assert doctor.check_hostname("localhost").status == "ok"


def test_slurm_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_slurm()
    assert check.status == "missing"
    assert not check.required


def test_slurm_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "sinfo", "echo")
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_slurm()
    assert check.status == "warn"
    assert "no sbatch, srun" in check.found


def test_slurm_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        script(tmp_path, name, "exit 0")
    script(tmp_path, "sinfo", "echo 'gpu* up 4'; echo 'cpu up 2'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    check = doctor.check_slurm()
    assert check == Check("SLURM", "ok", "partitions: gpu* up 4; cpu up 2, inside job 17")


def test_slurm_whose_controller_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        script(tmp_path, name, "exit 0")
    script(tmp_path, "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_slurm()
    assert check.status == "warn"
    assert "Unable to contact slurm controller" in check.found


@pytest.mark.parametrize(
    ("flags", "status"), [({"amx_bf16", "avx2"}, "ok"), ({"avx512_bf16"}, "ok"), ({"bf16"}, "ok"), ({"avx2"}, "warn")]
)
def test_bf16(flags: set[str], status: str) -> None:
    assert doctor.check_bf16(frozenset(flags)).status == status


def test_optional_packages() -> None:
    absent = doctor.check_package("no_such_package", extra="slurm", purpose="to submit")
    assert absent.status == "missing"
    assert "hpccl[slurm]" in absent.advice
    assert doctor.check_package("numpy", extra="", purpose="").status == "ok"
