"""Checksum of a source, verified once before a long build, even if the build is interrupted."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from hpccl.errors import ConfigError, DataError, FolderError
from hpccl.folder import replacing

__all__ = ["check_source", "parse_checksum"]

_NOTE = ".source.json"
_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}


def parse_checksum(text: str) -> tuple[str, str]:
    """Parse `sha256:<digest>` to (algorithm, hexadecimal digest); without an algorithm, the length decides.

    Raises:
        ConfigError: it is not a checksum.
    """
    name, _, digest = text.lower().strip().rpartition(":")
    name = name or next((known for known, digits in _DIGITS.items() if digits == len(digest)), "")
    if name not in _DIGITS or not re.fullmatch(f"[0-9a-f]{{{_DIGITS[name]}}}", digest):
        raise ConfigError(f"checksum '{text}' is invalid; allowed: {', '.join(f'{known}:HEX' for known in _DIGITS)}")
    return name, digest


def check_source(source: Path, expected: str, out: Path) -> None:
    """Compare a file with its checksum, unless a note in `out` records that this was done.

    Raises:
        ConfigError: the source is a folder.
        DataError: it differs, or does not exist.
        FolderError: the note cannot be written.
    """
    name, digest = parse_checksum(expected)
    if source.is_dir():
        raise ConfigError(f"source '{source}' is not a file, so it has no checksum: leave --checksum out")
    try:
        status = source.stat()
    except OSError as error:
        raise DataError(f"source '{source}' cannot be read: {error.strerror}") from error
    seen = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "checksum": f"{name}:{digest}"}
    note = out / _NOTE
    if _read(note) == seen:
        return
    with source.open("rb") as file:
        # Publishers often give MD5 sums; the check is against damage, not against attacks.
        found = hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
    if found != digest:
        raise DataError(
            f"source '{source}' has {name} {found}, not {digest}: it is damaged or another file; fetch it again"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"'{out}' cannot be made: {error.strerror}") from error
    with replacing(note) as path:
        path.write_text(json.dumps(seen))


def _read(note: Path) -> object:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
