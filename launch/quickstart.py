"""Train finetune, ewc+fr+replay and joint on the embedded digits, then compare them in one report.

Run it with `make quickstart`; finished runs are not repeated. Copy and edit it: a campaign is a list of `hpccl`
commands.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options

FOLDER = Path("runs/quickstart")
# (method, processes): one of them runs on two processes, which changes nothing but the speed.
RUNS = [("finetune", 1), ("ewc+fr+replay", 2), ("joint", 1)]


def campaign() -> Campaign:
    """Return three runs and their report."""
    steps = []
    for method, processes in RUNS:
        files = ["configs/quickstart.yaml", f"configs/method/{method}.yaml"]
        settings = ["memory.size=80", "prior.replay=0.75"] if "replay" in method else []
        world = [f"cluster.nproc={processes}"] if processes > 1 else []
        names = [f"folder={FOLDER}/{method}", f"name={method}"]
        steps.append(Step(method, ("train", *files, *settings, *world, *names)))
    folders = [f"{FOLDER}/{method}" for method, _ in RUNS]
    report = Step("report", ("report", *folders, "--out", f"{FOLDER}/report"), tuple(method for method, _ in RUNS))
    return Campaign(FOLDER, (*steps, report))


if __name__ == "__main__":
    sys.exit(carry_out(campaign, options(__doc__).parse_args()))
