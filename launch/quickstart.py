"""Train finetune, ewc+fr+replay and joint on the embedded digits, then compare them in one report.

Run it with `make quickstart`; a run that is already done is not repeated. Copy and edit it: a campaign is a list of
`hpccl` commands.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HPCCL = [sys.executable, "-m", "hpccl.cli"]
# (method, processes): one of them runs on two processes, which changes nothing but the speed.
RUNS = [("finetune", 1), ("ewc+fr+replay", 2), ("joint", 1)]


def main() -> int:
    """Run the three methods and print the table; the exit code of the first command that fails."""
    folders = []
    for method, processes in RUNS:
        folder = f"runs/quickstart/{method}"
        files = ["configs/quickstart.yaml", f"configs/method/{method}.yaml"]
        settings = ["memory.size=80", "prior.replay=0.75"] if "replay" in method else []
        command = [*HPCCL, "train", *files, *settings, f"folder={folder}", f"name={method}", f"--nproc={processes}"]
        print("+ hpccl", *command[len(HPCCL) :], flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
        folders.append(folder)
    command = [*HPCCL, "report", *folders, "--out", "runs/quickstart/report"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
