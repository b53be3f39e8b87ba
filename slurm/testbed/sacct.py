"""A stand-in for `sacct` on a cluster without slurmdbd: answers from `scontrol show job`.

Understands `-o/--format FIELDS`, `-j/--jobs IDS`, `-n/--noheader`; columns are always separated by `|`, as with
--parsable2. Other options are ignored. States are named as slurmdbd names them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

_FIELDS = ("JobID", "State", "NodeList")
_RENAMED = {
    "ExitCode": "ExitCode",
    "JobName": "JobName",
    "Partition": "Partition",
    "Elapsed": "RunTime",
    "Restarts": "Restarts",
    "Reason": "Reason",
    "Submit": "SubmitTime",
    "Start": "StartTime",
    "End": "EndTime",
}


def _arguments(argv: Sequence[str]) -> tuple[list[str], set[str], bool]:
    """(fields, wanted jobs, whether a header is wanted); a step such as 7.batch counts as its job."""
    fields, wanted, header = list(_FIELDS), set[str](), True
    rest = list(argv)
    while rest:
        option, _, value = rest.pop(0).partition("=")
        if option in ("-n", "--noheader"):
            header = False
        elif option in ("-o", "--format"):
            fields = [field.split("%")[0] for field in (value or rest.pop(0)).split(",")]
        elif option in ("-j", "--jobs"):
            wanted |= {job.split(".")[0] for job in (value or rest.pop(0)).split(",")}
    return fields, wanted, header


def _state(shown: dict[str, str]) -> str:
    state = shown.get("JobState", "UNKNOWN")
    if state == "CANCELLED":
        return "CANCELLED by 0"
    if state in ("PENDING", "COMPLETING") and shown.get("Restarts", "0") != "0":
        return "REQUEUED"
    return state


def _record(shown: dict[str, str]) -> dict[str, str]:
    name, array, task = shown["JobId"], shown.get("ArrayJobId"), shown.get("ArrayTaskId", "0")
    if array is not None:
        name = f"{array}_{task}" if task.isdigit() else f"{array}_[{task}]"
    nodes = shown.get("NodeList", "")
    record = {field: shown.get(source, "") for field, source in _RENAMED.items()}
    return record | {
        "JobID": name,
        "JobIDRaw": shown["JobId"],
        "State": _state(shown),
        "NodeList": "None assigned" if nodes in ("", "(null)") else nodes,
    }


def main(argv: Sequence[str]) -> int:
    """Print one line for each wanted job, or for all."""
    fields, wanted, header = _arguments(argv)
    asked = subprocess.run(["scontrol", "-o", "show", "job"], capture_output=True, text=True, check=False)
    if asked.returncode and "No jobs" not in asked.stdout + asked.stderr:
        sys.stderr.write(asked.stderr)
        return 1
    lines = ["|".join(fields)] if header else []
    for line in asked.stdout.splitlines():
        shown = dict(re.findall(r"(\S+?)=(\S*)", line))
        if "JobId" not in shown:
            continue
        record = _record(shown)
        if not wanted or wanted & {record["JobID"], record["JobIDRaw"], shown.get("ArrayJobId", "")}:
            lines.append("|".join(record.get(field, "") for field in fields))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
