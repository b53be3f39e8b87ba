"""From a configuration to a stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from hpccl.config.data import DataConfig
from hpccl.config.stream import DigitsStream, ShardStream, StreamConfig
from hpccl.data.build_digits import open_digits, outline_digits
from hpccl.data.build_shards import open_shards, outline_shards
from hpccl.data.outline import Outline
from hpccl.data.stream import ImageStream
from hpccl.errors import DataError

__all__ = ["open_stream", "outline"]


def open_stream(
    stream: StreamConfig, data: DataConfig, added: Sequence[str] = (), *, copies: Path | None = None
) -> ImageStream:
    """Open a stream of tasks. Every process of a run calls this; the first one on a machine decodes for all.

    added: folders of shards with further training images of the stream's classes; see `Stream.added`.
    copies: folder of the images that memory keeps for itself; if it has some of a part whose training shards are gone,
        the stream is opened all the same, and `absent` reports what cannot be read.

    Raises:
        ConfigError: classes cannot be cut into so many tasks, images have several sizes and data.image_size is not set,
            or settings do not go together.
        DataError: shards are missing or damaged, classes of the splits differ, the cache folder cannot be written, an
            image cannot be decoded and data.bad_images is `stop`, or added images have other classes, another size or
            (for the digits) other channels.
    """
    match stream:
        case DigitsStream():
            if added and not Path(added[0]).exists():
                raise DataError(f"'{added[0]}' does not exist; give a folder of shards, see `hpccl shards build`")
            if added:
                raise DataError(
                    f"'{added[0]}' cannot be added to the embedded digits, whose images have one channel and those of "
                    "shards three; allowed: runs with stream.kind=shards"
                )
            return open_digits(stream, data)
        case ShardStream():
            return open_shards(stream, data, added, copies)
        case _:
            assert_never(stream)


def outline(stream: StreamConfig, data: DataConfig, *, copies: Path | None = None) -> Outline:
    """Return the outline of the stream that `open_stream` would open; of shards, only the indices are read.

    Raises:
        ConfigError: classes cannot be cut into so many tasks, or images have several sizes and data.image_size is not
            set.
        DataError: shards are missing or damaged, or classes of the splits differ.
    """
    match stream:
        case DigitsStream():
            return outline_digits(stream, data)
        case ShardStream():
            return outline_shards(stream, data, copies=copies)
        case _:
            assert_never(stream)
