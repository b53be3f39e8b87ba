"""Rendering a plan as tables."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpccl.report.progress import duration
from hpccl.report.text import percent, size, whole
from hpccl.tools.plan.build import Plan

__all__ = ["render"]

_WHEN = {"always": "", "training": "training", "measuring": "end of a task", "step": "step", "task": "end of a task"}


def render(plan: Plan) -> Group:
    """Return tables of memory, communication and the time of a step, followed by notes."""
    parts: list[RenderableType] = [Text(line) for line in _head(plan)]
    parts += [_held(plan), _sent(plan)]
    if plan.spent:
        parts.append(_spent(plan))
    return Group(*parts, *(Text(note) for note in plan.notes))


def _head(plan: Plan) -> list[str]:
    settings = ", ".join(f"{key} {value}" for key, value in plan.engine.items() if key in ("stage", "shard_size"))
    world = f"{whole(plan.nodes)} x {whole(plan.nproc)} processes, engine {plan.engine['kind']}"
    learned = f"{whole(plan.num_classes)} classes in {whole(plan.tasks)} tasks"
    steps = f"{whole(plan.steps)} steps of {whole(plan.batch_size)}"
    return [
        f"{plan.run}: {plan.method}, {whole(plan.num_weights)} weights, {learned}",
        f"{world}{f' ({settings})' if settings else ''}, {whole(plan.rows)} images a micro-batch, {steps}",
    ]


def _held(plan: Plan) -> Table:
    table = _table("held by a process", "bytes", "when")
    for each in plan.held:
        place = "host memory" if each.host else ""
        table.add_row(each.name, size(each.num_bytes), ", ".join(part for part in (_WHEN[each.when], place) if part))
    table.add_section()
    table.add_row("training", size(plan.peak("training")), "")
    table.add_row("end of a task", size(plan.peak("measuring")), "")
    if plan.host:
        table.add_row("host memory", size(plan.host), "")
    return table


def _sent(plan: Plan) -> Table:
    table = _table("sent by a process", "bytes", "in every")
    for each in plan.sent:
        table.add_row(each.name, size(each.num_bytes), _WHEN[each.when])
    if not plan.sent:
        table.add_row("nothing", "", "")
    return table


def _spent(plan: Plan) -> Table:
    table = _table("a step", "ms", "%")
    total = sum(each.seconds for each in plan.spent)
    for each in plan.spent:
        table.add_row(each.name, f"{1e3 * each.seconds:.1f}", percent(each.seconds / total))
    table.add_section()
    table.add_row("all", f"{1e3 * total:.1f}", f"{whole(plan.batch_size / total)} images/s")
    for views in plan.views:
        share = f"{whole(views.steps)} steps, passes {percent(views.cost)} %"
        table.add_row(f"of views of {views.side} pixels", "", share)
    table.add_row("all steps", duration(plan.run_seconds), "")
    return table


def _table(*headings: str) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    first, second, *others = headings
    table.add_column(first)
    table.add_column(second, justify="right")
    for heading in others:
        table.add_column(heading)
    return table
