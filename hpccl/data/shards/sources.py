"""Sources of images: a folder, a zip or a tar of class folders, or a tar (or folder) of per-class tars.

Nothing is extracted: a scan finds file and position of each image's bytes, and any process can read them from there.
Every image has a path within the source, in which an inner tar counts as a folder:

    [wrapper/...][train|test|val/]class/.../image.jpg

If a file gives the labels, folders are ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from hpccl.data.shards.labels import Labels
from hpccl.errors import DataError

__all__ = ["SPLITS", "Listing", "Member", "SourceReader", "sample_key", "scan"]

SPLITS = ("train", "test", "val")

# Folders of these names are splits, whatever their case, and never all classes of a source.
_LIKE_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}

_IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|p[bgnp]m)$", re.IGNORECASE)
_COMPANION = re.compile(r"\.(txt|xml|json|csv|mat|md)$", re.IGNORECASE)  # files that lie beside images, and are none
_LOOKED_FOR = ".jpg .jpe .jfif .png .webp .gif .bmp .tif .ppm .pgm .pbm .pnm"
_MAX_KEY = 80  # characters; a plain tar header holds names of 100 bytes
_TAR = re.compile(r"\.tar$", re.IGNORECASE)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_READ = 1 << 20  # bytes at a time
_MAX_OPEN = 8  # files of a source
_LOCAL_HEADER = 30  # bytes of a zip's local header before the name (APPNOTE.TXT 4.3.7)


class Member(NamedTuple):
    """The location of one image's bytes.

    name: path within the source; file: the file that holds it, relative to the source, or '' for the source itself;
    offset: first byte there (of a zip: of its local header); stored: bytes there; size: bytes when unpacked;
    method: None outside zips, else zipfile's; crc: of the unpacked bytes, in zips.
    """

    name: str
    file: str
    offset: int
    stored: int
    size: int
    method: int | None = None
    crc: int = 0


# split -> class -> images, sorted by name; a source without splits has the single split ''.
Listing = dict[str, dict[str, list[Member]]]


def sample_key(path: str) -> str:
    """Return an image's file name without folders, extension and characters that break webdataset or tar."""
    name = PurePosixPath(path.replace("\\", "/")).name
    return re.sub(r"[^A-Za-z0-9_-]", "_", _IMAGE.sub("", name))[:_MAX_KEY]


def scan(source: Path, labels: Labels | None = None, *, note: Callable[[str], None] | None = None) -> Listing:
    """Find all images.

    Args:
        source: folder or archive.
        labels: classes of the images, used instead of folders.
        note: told of files that were left out, if there are any.

    Raises:
        DataError: no such source, nothing usable in it, a class folder without images, a member whose path leads out
            of it, or labels that are not of these images.
    """
    if not source.exists():
        raise DataError(f"source '{source}' does not exist: give a folder, a zip or a tar of images")
    try:
        files = [member for member in _members(source) if not _is_junk(member.name)]
    except OSError as error:
        raise DataError(f"source '{source}' cannot be read: {error}") from error
    members = [member for member in files if _IMAGE.search(member.name)]
    if not members:
        raise DataError(f"no images in '{source}': looked for {_LOOKED_FOR} in class folders")
    # Beside class folders, other files are no images that somebody may miss.
    others = [file.name for file in files if not _IMAGE.search(file.name) and (labels is not None or "/" in file.name)]
    if others and note is not None:
        note(_left_out(others))
    name, times = Counter(member.name for member in members).most_common(1)[0]
    if times > 1:
        raise DataError(f"'{name}' is in '{source}' {times} times: remove all but one")
    if labels is not None:
        return _labelled(sorted(members), labels)
    listing = _arrange(sorted(members), source)
    _refuse_empty_classes(listing, source)
    return listing


def _left_out(names: list[str]) -> str:
    kinds = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in names)
    often = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    listed = ", ".join(f"{kind} ({kinds[kind]})" for kind in often)
    return f"{len(names)} {'file was' if len(names) == 1 else 'files were'} left out: {listed}"


class SourceReader:
    """Reads members; keeps a few files open."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._open: dict[str, BinaryIO] = {}

    def read(self, member: Member) -> bytes:
        """Return the image file's bytes.

        Raises:
            DataError: the source changed or is damaged.
        """
        try:
            file = self._file(member.file)
            data = _pread(file, _payload_offset(file, member), member.stored)
            if member.method == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
        except (OSError, zlib.error) as error:
            raise DataError(f"'{member.name}' in '{self.source}' cannot be read: {error}") from error
        if len(data) != member.size or (member.method is not None and zlib.crc32(data) != member.crc):
            raise DataError(f"'{member.name}' in '{self.source}' is truncated or altered: fetch the source again")
        return data

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, name: str) -> BinaryIO:
        if name not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            path = self.source / name if name else self.source
            self._open[name] = open(path, "rb", buffering=0)  # noqa: SIM115 - it stays open, `close` closes all
        return self._open[name]


# ---------------------------------------------------------------- scanning


def _members(source: Path) -> Iterator[Member]:
    """Yield images, and other files but for companions without their places."""
    if source.is_dir():
        return _scan_folder(source)
    with source.open("rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        return _scan_tar(source)
    if zipfile.is_zipfile(source):
        return _scan_zip(source)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"'{source}' is compressed ({kind}), so it has no random access: unpack it to a .tar first")
    return _scan_tar(source)


def _scan_folder(source: Path) -> Iterator[Member]:
    tars = []
    for path, size in _walk(source, "", set()):
        if _IMAGE.search(path):
            yield Member(path, path, 0, size, size)
        elif _TAR.search(path):
            tars.append((path, size))
        else:
            yield _other(path)
    yield from _scan_inner_tars(source, [(path, path, 0, size) for path, size in tars])


def _walk(source: Path, inside: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Yield (path, bytes) of all files but companions, following links without cycles."""
    status = os.stat(source / inside)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen = {*seen, (status.st_dev, status.st_ino)}
    with os.scandir(source / inside) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(source, path, seen)
            elif _IMAGE.search(entry.name) or _TAR.search(entry.name):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    yield path, status.st_size
            elif not _COMPANION.search(entry.name) and entry.is_file():
                yield path, 0


def _scan_zip(source: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise DataError(f"'{source}' is a damaged zip ({error}): fetch it again") from error
    for entry in entries:
        name = _safe(entry.filename, source)
        if entry.is_dir() or _COMPANION.search(name):
            continue
        if not _IMAGE.search(name):
            yield _other(name)
            continue
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"'{name}' in '{source}' is encrypted or compressed by an unusual method: zip it anew")
        method, crc = entry.compress_type, entry.CRC
        yield Member(name, "", entry.header_offset, entry.compress_size, entry.file_size, method, crc)


def _scan_tar(source: Path) -> Iterator[Member]:
    end = source.stat().st_size
    found = list(_tar_entries(source, source, 0, end))
    inner = [(name, "", offset, size) for name, offset, size in found if _TAR.search(name)]
    for name, offset, size in found:
        if _IMAGE.search(name):
            yield Member(name, "", offset, size, size)
        elif not _TAR.search(name):
            yield _other(name)
    yield from _scan_inner_tars(source, inner)


def _scan_inner_tars(source: Path, tars: list[tuple[str, str, int, int]]) -> Iterator[Member]:
    """Yield the images of tars at (name, file, offset, size)."""

    def listed(tar: tuple[str, str, int, int]) -> list[Member]:
        name, file, offset, size = tar
        folder = _TAR.sub("", name)
        path = source / file if file else source
        entries = _tar_entries(path, source, offset, offset + size)
        return [
            Member(f"{folder}/{inner}", file, at, n, n) if _IMAGE.search(inner) else _other(f"{folder}/{inner}")
            for inner, at, n in entries
        ]

    # Listing a tar takes one small read per image, which waits for the disk rather than for Python.
    with ThreadPoolExecutor(max_workers=16) as threads:
        for members in threads.map(listed, tars):
            yield from members


def _tar_entries(path: Path, source: Path, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first byte in the file, bytes) of the files but companions in the tar at [start, end)."""
    last = ""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        file.seek(start)
        try:
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every header in memory
                if entry.offset >= end:
                    break
                name = last = _safe(entry.name, source)
                if entry.isdir() or _COMPANION.search(name):
                    continue
                if _IMAGE.search(name) or _TAR.search(name):
                    _check_tar_entry(entry, name, source, end)
                yield name, entry.offset_data, entry.size
            _check_tar_end(file, archive.offset if entry is None else end, end, source, last)
        except tarfile.TarError as error:
            raise DataError(f"'{source}' is neither a folder, a zip nor a whole tar ({error})") from error


def _check_tar_end(file: BinaryIO, offset: int, end: int, source: Path, last: str) -> None:
    """Check that only zeros follow the last member: tarfile also takes a damaged header for the end."""
    where = f"after '{last}', at byte {offset}"
    if offset + tarfile.BLOCKSIZE > end:
        raise DataError(f"'{source}' is truncated {where}: it has no end mark; fetch or pack it again")
    while offset < end:
        part = _pread(file, offset, min(_READ, end - offset))
        if part.count(0) < len(part):
            raise DataError(
                f"'{source}' is damaged {where}: what follows is neither a member nor the end; fetch or pack it again "
                "(repack concatenated tars as one)"
            )
        offset += len(part)


def _check_tar_entry(entry: tarfile.TarInfo, name: str, source: Path, end: int) -> None:
    if not entry.isreg() or entry.issparse():
        raise DataError(
            f"'{name}' in '{source}' is a link or a special file: pack the image itself (tar --dereference)"
        )
    if entry.offset_data + entry.size > end:
        raise DataError(f"'{source}' is truncated within '{name}': fetch it again")


def _other(name: str) -> Member:
    """Return a file that is no image and will not be read."""
    return Member(name, "", 0, 0, 0)


def _safe(name: str, source: Path) -> str:
    """Return the name without './', with slashes where an archive from Windows has backslashes."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:/", str(path)):
        raise DataError(f"member '{name}' of '{source}' points outside the archive: refused, do not trust this file")
    return str(path)


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


# ---------------------------------------------------------------- reading


def _payload_offset(file: BinaryIO, member: Member) -> int:
    if member.method is None:
        return member.offset
    header = _pread(file, member.offset, _LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise OSError("the zip changed since it was listed")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return member.offset + _LOCAL_HEADER + name + extra


def _pread(file: BinaryIO, offset: int, length: int) -> bytes:
    parts = []
    while length > 0:
        part = os.pread(file.fileno(), length, offset)
        if not part:
            raise OSError("the file ends too early")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# ---------------------------------------------------------------- splits and classes


def _arrange(members: list[Member], source: Path) -> Listing:
    paths = [tuple(member.name.split("/")) for member in members]
    while len(top := {path[0] for path in paths}) == 1 and not top <= set(SPLITS) and min(map(len, paths)) >= 3:
        paths = [path[1:] for path in paths]  # the folder that was packed, and those around it
    has_splits = _has_splits(paths)
    if not has_splits:
        _refuse_half_splits(paths, source)
        _refuse_hidden_splits(paths, source)
    listing: Listing = {}
    for path, member in zip(paths, members, strict=True):
        if len(path) < 2 + has_splits:
            raise DataError(
                f"'{member.name}' in '{source}' has no class: images must lie in <class>/ or in "
                f"{'|'.join(SPLITS)}/<class>/, or a file must give their classes (--labels FILE)"
            )
        split, name = (path[0], path[1]) if has_splits else ("", path[0])
        listing.setdefault(split, {}).setdefault(name, []).append(member)
    for name in {name for classes in listing.values() for name in classes}:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"class {name!r} in '{source}' has a name that is not UTF-8: rename its folder") from None
    return listing


def _refuse_empty_classes(listing: Listing, source: Path) -> None:
    """Refuse class folders without readable images, which would otherwise be left out unnoticed."""
    for split, classes in listing.items():
        name, (first, *_) = next(iter(classes.items()))
        if first.file != first.name:  # a tar has them
            continue
        parts = first.name.split("/")
        beside = source.joinpath(*parts[: parts.index(split) + 1 if split else parts.index(name)])
        folders = sorted(each.name for each in beside.iterdir() if each.is_dir() and not _is_junk(each.name))
        empty = [folder for folder in folders if folder not in classes]
        if empty:
            raise DataError(
                f"class folder '{beside / empty[0]}' has no images ({len(empty)} of {len(folders)} such folders): "
                f"looked for {_LOOKED_FOR}; put its images there, or remove it"
            )


def _labelled(members: list[Member], labels: Labels) -> Listing:
    by_class: dict[str, list[Member]] = {}
    for member, name in zip(members, labels.of([member.name for member in members]), strict=True):
        by_class.setdefault(name, []).append(member)
    return {"": by_class}


def _refuse_half_splits(paths: Sequence[tuple[str, ...]], source: Path) -> None:
    """Refuse a mixture of splits and classes, in which splits would be taken for classes."""
    splits = sorted({path[0] for path in paths if path[0] in SPLITS and len(path) >= 3})
    others = sorted({path[0] for path in paths if path[0] not in SPLITS and len(path) >= 2})
    if splits and others:
        raise DataError(
            f"'{others[0]}' lies beside '{splits[0]}' in '{source}', which contains class folders: the top "
            f"folders must all be splits ({', '.join(SPLITS)}) or all be classes; rename '{others[0]}' or take it out"
        )


def _refuse_hidden_splits(paths: Sequence[tuple[str, ...]], source: Path) -> None:
    """Refuse folders that are splits by their names but would be taken for classes, or for folders within classes."""
    for depth in range(min(map(len, paths)) - 1):
        names = sorted({path[depth] for path in paths})
        if {name.lower() for name in names} <= _LIKE_SPLITS:
            raise DataError(
                f"all images of '{source}' lie in folders called {', '.join(names)}, which are splits, not classes: "
                f"the top folders must be called {', '.join(SPLITS)} and contain class folders; rename or move them, "
                "or build each split from its own folder (--split NAME; without class folders, --labels FILE)"
            )


def _has_splits(paths: Iterable[tuple[str, ...]]) -> bool:
    """Whether the first folder is the split: always one of train, test, val, with class folders inside."""
    return all(path[0] in SPLITS and len(path) >= 3 for path in paths)
