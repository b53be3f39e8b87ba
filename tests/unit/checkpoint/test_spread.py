"""Spread tensors in files: any ranks' parts are written, any run of elements is read, what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpccl.checkpoint.tree import has_slabs, read_tree, write_slabs, write_tree
from hpccl.dist.spread import Slab, Span, Stored, elements, whole
from hpccl.errors import CheckpointError


def value(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).to(dtype).view(shape)


def stems(writers: int) -> list[str]:
    return [f"weights-{rank:05d}-of-{writers:05d}" for rank in range(writers)]


def write(folder: Path, trees: list[dict[str, Any]]) -> None:
    """As `writers` ranks would, the first of which is the leader."""
    for stem, tree in zip(stems(len(trees)), trees, strict=True):
        write_slabs(folder, tree, header={}, stem=stem)
    write_tree(folder, trees[0], header={"count": len(trees)})


def read(folder: Path) -> dict[str, Any]:
    return read_tree(folder, slabs=lambda header: stems(header["count"]))[1]


def by_rows(full: Tensor, writers: int, copies: int = 1) -> list[Slab]:
    """The parts of `copies` groups of ranks with the same elements."""
    spans = [
        Span.of_rows(tuple(full.shape), rank, writers, copy=copy) for copy in range(copies) for rank in range(writers)
    ]
    return [Slab(elements(full, span.start, span.stop).clone(), span) for span in spans]


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    writers=st.integers(1, 6),
    copies=st.integers(1, 2),
    data=st.data(),
)
def test_any_range_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], writers: int, copies: int, data: st.DataObject
) -> None:
    """Ranks without a row write none; of copies, the first is written."""
    folder, full = tmp_path_factory.mktemp("checkpoint"), value(shape)
    write(folder, [{"deep": [{"w": slab}], "n": 1} for slab in by_rows(full, writers, copies)])
    tree = read(folder)
    stored = tree["deep"][0]["w"]
    assert isinstance(stored, Stored)
    assert (stored.shape, tree["n"]) == (shape, 1)
    start = data.draw(st.integers(0, full.numel()))
    stop = data.draw(st.integers(start, full.numel()))
    assert torch.equal(stored.read(start, stop), full.flatten()[start:stop])
    assert torch.equal(whole(stored), full)


def test_parts_of_any_order_and_length(tmp_path: Path) -> None:
    """Such as those of ZeRO-1, whose buffers begin in the middle of one tensor and end in another."""
    full = value((4, 5))
    spans = [Span((4, 5), 13, 20), Span((4, 5), 0, 0), Span((4, 5), 0, 2), Span((4, 5), 2, 13)]
    write(tmp_path, [{"w": Slab(elements(full, span.start, span.stop).clone(), span)} for span in spans])
    assert torch.equal(read(tmp_path)["w"].read(1, 15), torch.arange(1.0, 15.0))


def test_an_altered_part_is_noticed_where_it_is_read_whole(tmp_path: Path) -> None:
    full = value((4, 5))
    write(tmp_path, [{"w": slab} for slab in by_rows(full, 2)])
    path = tmp_path / f"{stems(2)[1]}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    stored = read(tmp_path)["w"]
    assert torch.equal(stored.read(0, 10), full.flatten()[:10])
    with pytest.raises(CheckpointError, match="'/w' was altered since it was written"):
        whole(stored)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_and_whole_tensors_beside(tmp_path: Path, dtype: torch.dtype) -> None:
    full = value((3, 3), dtype)
    trees: list[dict[str, Any]] = [{"w": slab, "b": torch.ones(2)} for slab in by_rows(full, 2)]
    assert has_slabs(trees[0])
    assert not has_slabs({"b": torch.ones(2)})
    write(tmp_path, trees)
    tree = read(tmp_path)
    assert torch.equal(tree["b"], torch.ones(2))
    assert tree["w"].read(2, 7).dtype == dtype
    assert torch.equal(whole(tree["w"]), full)


def test_a_part_of_a_larger_buffer_is_written_alone(tmp_path: Path) -> None:
    """What an optimiser has is often a view of all its state."""
    buffer = torch.arange(1000.0)
    write(tmp_path, [{"w": Slab(buffer[500:504], Span((4,), 0, 4))}])
    assert read(tmp_path)["w"].read(0, 4).tolist() == [500, 501, 502, 503]
    assert (tmp_path / f"{stems(1)[0]}.safetensors").stat().st_size < 1000


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """What three ranks wrote."""
    write(tmp_path, [{"w": slab} for slab in by_rows(value((6, 4)), 3)])
    return tmp_path


def error_of(folder: Path) -> str:
    """Of reading all of it, opening included; in one line, that says what to do."""
    with pytest.raises(CheckpointError) as caught:
        whole(read(folder)["w"])
    (line,) = str(caught.value).splitlines()
    assert str(folder) in line
    assert "continue from the one before" in line
    return line


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_missing_file_is_named(three: Path, suffix: str) -> None:
    (three / f"{stems(3)[1]}.{suffix}").unlink()
    assert stems(3)[1] in error_of(three)


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_truncated_file_is_named(three: Path, kept: int) -> None:
    torn = three / f"{stems(3)[2]}.safetensors"
    torn.write_bytes(torn.read_bytes()[:kept])
    assert stems(3)[2] in error_of(three)


@pytest.mark.parametrize("kept", [0, 10])
def test_a_truncated_table_is_an_error(three: Path, kept: int) -> None:
    torn = three / f"{stems(3)[0]}.json"
    torn.write_bytes(torn.read_bytes()[:kept])
    error_of(three)


def test_elements_that_nobody_wrote_are_counted(three: Path) -> None:
    table = three / f"{stems(3)[1]}.json"
    content = json.loads(table.read_text())
    del content["tree"]["/w"]
    table.write_text(json.dumps(content))
    assert "8 elements of '/w' are missing from the files" in error_of(three)
    assert read(three)["w"].read(16, 24).tolist() == list(range(16, 24))  # the rest is there


def test_a_tensor_that_nobody_wrote(tmp_path: Path) -> None:
    write(tmp_path, [{"w": Slab(torch.zeros(0), Span((3,), 0, 0))}])
    with pytest.raises(CheckpointError, match="3 elements of '/w' are missing from the files"):
        whole(read(tmp_path)["w"])
