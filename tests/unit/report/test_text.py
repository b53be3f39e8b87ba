from __future__ import annotations

import doctest

from hpccl.report import progress, text


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (text, progress):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_a_table_is_aligned_and_escapes_bars() -> None:
    assert text.markdown_table(["a", "value"], [["x|y", "1"], ["z", "100"]]) == (
        "| a    | value |\n| ---- | ----: |\n| x\\|y |     1 |\n| z    |   100 |\n"
    )
