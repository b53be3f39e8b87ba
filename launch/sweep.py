r"""A sweep and its report: the runs side by side, then one comparison of all of them.

    python launch/sweep.py sweep-lambda configs/quickstart.yaml configs/method/ewc.yaml \
        prior.quadratic.weight=0.1,1,10 seed=0,1,2 --jobs 2
    python launch/sweep.py ... --cluster slurm --with configs/cluster/slurm_cpu.yaml

The runs are in runs/NAME, one folder each. On a cluster they are one job array, and the report job waits for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hpccl.cluster.campaign import Campaign, Step, carry_out, options
from hpccl.config.load import is_override, points, sweep
from hpccl.errors import ConfigError


def campaign(name: str, arguments: list[str], *, together: bool) -> Campaign:
    """Return the runs and their report; with `together`, all runs are one step, which becomes a job array."""
    folder = Path("runs", name)
    files = [argument for argument in arguments if not is_override(argument)]
    settings = [argument for argument in arguments if is_override(argument)]
    own = {setting.partition("=")[0] for setting in settings} & {"name", "folder"}
    if own:
        raise ConfigError(f"{', '.join(sorted(own))} follow from the name of the sweep, '{name}'; leave them out")
    named = [*settings, f"name={name}", f"folder={folder}"]
    paths = [config.path for config in sweep([Path(file) for file in files], named)]
    values = points(settings)
    if together or len(paths) == 1:
        steps = [Step("runs", ("train", *files, *named))]
    else:
        fixed = [setting for setting in settings if setting.partition("=")[0] not in values[0]]
        steps = [
            Step(Path(path).name, ("train", *files, *fixed, *_written(point, name, path)))
            for path, point in zip(paths, values, strict=True)
        ]
    names = tuple(step.name for step in steps)
    return Campaign(folder, (*steps, Step("report", ("report", *paths, "--out", f"{folder}/report"), after=names)))


def _written(point: dict[str, str], name: str, path: str) -> list[str]:
    """Return a run's overrides; its folder is quoted, as it contains values whose commas would make it a sweep."""
    return [*(f"{key}={value}" for key, value in point.items()), f"name={name}", f"folder={json.dumps(path)}"]


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("name", help="name of the sweep; its folder is runs/NAME")
    parser.add_argument("arguments", nargs="+", metavar="FILE|key=a,b", help="files and settings, as for hpccl train")
    chosen = parser.parse_intermixed_args()
    sys.exit(carry_out(lambda: campaign(chosen.name, chosen.arguments, together=chosen.cluster == "slurm"), chosen))
