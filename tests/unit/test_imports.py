"""What a login node imports stays free of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = (
    "__init__.py",
    "errors.py",
    "folder.py",
    "compat.py",
    "doctor.py",
    "machine.py",
    "cli",
    "config",
    "report",
    *(f"cluster/{name}.py" for name in ("cancel", "jobs", "logs", "queue", "records", "status", "status_table")),
    *(
        f"cluster/{name}.py"
        for name in ("background", "campaign", "job", "local", "prepare", "slurm", "step", "submit")
    ),
)


def modules(part: str) -> list[str]:
    """Dotted names of a module, or of a package and everything in it."""
    path = ROOT / "hpccl" / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_no_torch_on_the_login_node() -> None:
    names = [name for part in WITHOUT_TORCH for name in modules(part)]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
print("done")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "done", f"imports torch, or does not import at all: {done.stderr}"


def test_training_without_shards_does_without_the_half_of_torch_that_makes_them() -> None:
    code = "import sys, hpccl.train.run; sys.exit('torch.distributed.fsdp' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
