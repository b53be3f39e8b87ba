"""The cost of `hpccl submit` on a real SLURM (slurm/testbed), compared with a plain `sbatch` of the job. Needs root.

Commands are called in turns, medians are reported, in seconds by the clock:

    return_one             `hpccl submit` of one run, until it returns
    return_array           the same for a sweep of 100 runs, as one array
    return_sbatch          `sbatch` of a script that starts the same training with srun, without checks

    first_step             from the start of `hpccl submit` until the first training step is in the event log
    first_step_sbatch      the same for that script
    start_up_overhead      their difference, turn by turn
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks._common import print_result
from slurm.testbed.testbed import Settings, Testbed, obstacle

ROOT = Path(__file__).resolve().parent.parent
ARRAY = 100
RUN = (
    *("model.kind=mlp", "model.hidden=[24]", "train.epochs=2", "train.batch_size=32", "log.every=1"),
    *("log.tensorboard=false", "engine.device=cpu"),
)
CLUSTER = ("cluster.kind=slurm", "cluster.threads=1", "cluster.mem=1G")
HELD = "cluster.extra={hold: true}"  # submitted, but not started
SCRIPT = """\
#!/bin/bash
srun {python} -m hpccl.cli train "$@"
"""


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    turns = 1 if options.quick else options.turns
    absent = obstacle()
    if absent is not None:
        print_result("submit", {}, skipped=absent)
        return
    folder = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp"))  # a short path, for Unix sockets
    try:
        with Testbed(folder / "c", Settings(nodes=2)) as testbed:
            os.environ["PATH"] = testbed.search_path
            os.environ["PYTHONPATH"] = str(ROOT)
            found = measure(folder, turns)
    finally:
        shutil.rmtree(folder)
    headline = {name: median(seconds) for name, seconds in found.items()}
    pairs = zip(found["first_step"], found["first_step_sbatch"], strict=True)
    headline["start_up_overhead"] = median(ours - theirs for ours, theirs in pairs)
    print_result("submit", headline, seconds=found, array=ARRAY, quick=options.quick)


def measure(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return the seconds of every turn, after one turn for warm-up."""
    script = folder / "bare.sbatch"
    script.write_text(SCRIPT.format(python=sys.executable))
    found: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        place = folder / f"turn-{turn}"
        place.mkdir()
        seconds = {
            "return_one": submitted(place / "one", HELD),
            "return_array": submitted(place / "array", HELD, f"seed={','.join(map(str, range(ARRAY)))}"),
            "return_sbatch": sbatch(script, place / "none", "--hold"),
        }
        ask("scancel", f"--user={os.getuid()}")
        seconds["first_step"] = first_step(place / "ours", submitted(place / "ours"))
        seconds["first_step_sbatch"] = first_step(place / "bare", sbatch(script, place / "bare"))
        for name, value in seconds.items():
            if turn:
                found.setdefault(name, []).append(value)
        print(f"turn {turn}:", {name: round(value, 2) for name, value in seconds.items()}, flush=True)
    return found


def submitted(run: Path, *settings: str) -> float:
    """Return the seconds that `hpccl submit` takes."""
    return ask(sys.executable, "-m", "hpccl.cli", "submit", *RUN, *CLUSTER, f"folder={run}", *settings)


def sbatch(script: Path, run: Path, *options: str) -> float:
    """Return the seconds that `sbatch` takes."""
    log = f"--output={run.parent}/%j.log"
    return ask("sbatch", log, "--mem=1G", *options, str(script), *RUN, "cluster.threads=1", f"folder={run}")


def first_step(run: Path, spent: float) -> float:
    """Return the seconds from the command, which took `spent` of them, to the first logged training step; then wait."""
    began = time.monotonic() - spent
    diary = run / "events.jsonl"
    while not _has(diary, "step"):
        time.sleep(0.005)
    seconds = time.monotonic() - began
    while not _has(diary, "done"):
        time.sleep(0.05)
    return seconds


def _has(diary: Path, kind: str) -> bool:
    lines = diary.read_text().split("\n")[:-1] if diary.exists() else []
    return any(json.loads(line)["event"] == kind for line in lines)


def ask(*command: str) -> float:
    """Return the seconds that a command takes; it must succeed."""
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
