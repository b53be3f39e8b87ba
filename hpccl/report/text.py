"""Numbers in readable form, and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["TextTable", "fixed", "markdown_table", "percent", "plus_minus", "signed", "size", "time_span", "whole"]

_ABSENT = "–"


@dataclass(frozen=True)
class TextTable:
    """A table of formatted cells; the first `left` columns are text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left: int = 1
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table and its notes, without the title."""
        return "\n".join(
            [markdown_table(self.header, self.rows, left=self.left), *(f"{note}\n" for note in self.notes)]
        )


def percent(value: float | None) -> str:
    """Format a share in [0, 1] in percent, without the percent sign.

    >>> percent(0.8231), percent(None)
    ('82.3', '–')
    """
    return _ABSENT if value is None or math.isnan(value) else f"{100 * value:z.1f}"


def signed(value: float | None) -> str:
    """Format a difference of shares in percentage points, with its sign.

    >>> signed(-0.012), signed(0.5)
    ('−1.2', '+50.0')
    """
    return _ABSENT if value is None else f"{100 * value:+z.1f}".replace("-", "−")


def plus_minus(mean: float | None, std: float | None, scale: float = 100.0, digits: int = 1) -> str:
    """Format a mean and, if there is one, its standard deviation.

    >>> plus_minus(0.8, 0.011), plus_minus(0.8, None), plus_minus(-0.0004, None)
    ('80.0 ± 1.1', '80.0', '0.0')
    """
    if mean is None:
        return _ABSENT
    text = f"{scale * mean:z.{digits}f}".replace("-", "−")
    return text if std is None else f"{text} ± {scale * std:.{digits}f}"


def fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` decimals; very large and very small ones with an exponent.

    >>> fixed(0.12345), fixed(1e-5), fixed(float("nan"))
    ('0.123', '1.00e−05', '–')
    """
    if value is None or math.isnan(value):
        return _ABSENT
    text = f"{value:.{digits}f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
    return text.replace("-", "−")


def whole(value: float | None) -> str:
    """Format a whole number with separated thousands.

    >>> whole(12345.6)
    '12,346'
    """
    return _ABSENT if value is None else f"{value:,.0f}"


def size(num_bytes: float | None) -> str:
    """Format bytes in binary units.

    >>> size(512), size(1536), size(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    if num_bytes is None:
        return _ABSENT
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def time_span(seconds: float | None) -> str:
    """Format a duration.

    >>> time_span(0.234), time_span(75.4), time_span(7300)
    ('0.23 s', '1 min 15 s', '2 h 01 min')
    """
    if seconds is None:
        return _ABSENT
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return a Markdown table with aligned columns; the first `left` columns are flush left, the others flush right."""
    cells = [list(header), *([text.replace("|", "\\|") for text in row] for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [_line(row, widths, left) for row in cells]
    rule = [("-" * width) if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    aligned = [
        text.ljust(width) if column < left else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join(aligned)} |"
