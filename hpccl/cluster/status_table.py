"""The output of `hpccl status`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpccl.cluster.status import RunStatus, State, read_statuses
from hpccl.output import console
from hpccl.report.events import json_text
from hpccl.report.progress import duration

__all__ = ["render", "show", "watch"]

_COLOURS: dict[State, str] = {
    "running": "green",
    "done": "bold green",
    "failed": "bold red",
    "lost": "bold red",
    "timed out": "red",
    "unreadable": "red",
    "unknown": "yellow",
    "stopped": "yellow",
    "cancelled": "yellow",
}


def show(folders: Sequence[Path], *, as_json: bool = False) -> list[RunStatus]:
    """Print the status of the runs once, and return it."""
    found = read_statuses(folders)
    if as_json:
        print(json_text([status.as_dict() for status in found]), flush=True)
    else:
        console(columns=240).print(render(found))
    return found


def watch(folders: Sequence[Path], interval: float, *, as_json: bool = False) -> None:
    """Print the status repeatedly until all runs have ended; on a terminal, in place."""
    if as_json or not sys.stdout.isatty():
        while not all(status.ended for status in show(folders, as_json=as_json)):
            time.sleep(interval)
        return
    with Live(console=Console(), auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            found = read_statuses(folders)
            clock = Text(time.strftime("%H:%M:%S"), style="dim")
            live.update(Group(render(found), clock), refresh=True)
            if all(status.ended for status in found):
                return
            time.sleep(interval)


def render(found: Sequence[RunStatus]) -> Group:
    """Return a table with a line for each run, without empty columns, and the errors below it."""
    parent = _parent([status.run for status in found])
    cells = {name: [cell(status) for status in found] for name, cell in _COLUMNS.items()}
    table = Table(title=f"in {parent}" if parent else None, title_justify="left", box=None, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", overflow="fold", min_width=12)
    shown = [name for name, column in cells.items() if any(column)]
    for name in shown:
        table.add_column(name, no_wrap=True, justify="left" if name in ("job", "task", "nodes") else "right")
    for row, status in enumerate(found):
        state = Text(status.state, style=_COLOURS.get(status.state, ""))
        state.append(f" ({status.detail})" if status.detail else "", style="not bold default")
        table.add_row(_shortened(status.run, parent), state, *(cells[name][row] or "-" for name in shown))
    errors = [
        Text.assemble((_shortened(status.run, parent), "bold"), ": ", (status.error, "red"))
        for status in found
        if status.error
    ]
    return Group(table, *([Text(""), *errors] if errors else []))


def _parent(runs: Sequence[Path]) -> str:
    """Return the folder that several runs have in common; empty for one run or if it is not worth showing."""
    if len(runs) < 2:
        return ""
    common = os.path.commonpath([str(run.absolute().parent) for run in runs])
    here = os.path.relpath(common)
    return "" if common == str(Path.cwd()) or common == "/" else min(here, common, key=len)


def _shortened(run: Path, parent: str) -> str:
    if parent:
        return os.path.relpath(run.absolute(), Path(parent).absolute())
    return min(os.path.relpath(run), str(run), key=len)


def _task(status: RunStatus) -> str:
    if status.task is None or status.state == "done":
        return f"{status.num_tasks}/{status.num_tasks}" if status.state == "done" and status.num_tasks else ""
    total = f"/{status.num_tasks}" if status.num_tasks is not None else ""
    return f"{min(status.task + 1, status.num_tasks or status.task + 1)}{total} {status.phase or ''}".strip()


def _step(status: RunStatus) -> str:
    if status.step is None or status.state == "done" or status.phase not in ("fit", "start"):
        return ""
    return f"{status.step}/{status.num_steps}" if status.num_steps is not None else str(status.step)


def _ago(status: RunStatus) -> str:
    if status.silent is None:
        return ""
    if status.silent < 60:
        return f"{status.silent:.0f} s ago"
    minutes = status.silent / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"


_COLUMNS: dict[str, Callable[[RunStatus], str]] = {
    "job": lambda status: status.job,
    "nodes": lambda status: status.nodes if len(status.nodes) <= 24 else f"{status.nodes[:23]}…",
    "task": _task,
    "step": _step,
    "epoch": lambda status: f"{status.epoch:.1f}" if status.epoch is not None and _step(status) else "",
    "images/s": lambda status: f"{status.images_per_second:,.0f}" if status.images_per_second is not None else "",
    "left": lambda status: duration(status.left) if status.left is not None else "",
    "limit": lambda status: duration(status.limit_left) if status.limit_left is not None else "",
    "restarts": lambda status: str(status.restarts) if status.restarts else "",
    "last event": _ago,
}
