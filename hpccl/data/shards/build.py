"""From a source of images to shards: in parallel, and resumable after a kill at any moment.

A shard is the unit of work. It is written to a temporary file and renamed, then a note about it is written to
`.build/`; a later run of the same command skips the shards that have a note. The manifest is made from all notes and
written last. Run again when all is done, the command writes only the shards that are missing or have another size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpccl.data.shards.checksum import check_source
from hpccl.data.shards.encodings import Encoding, Original, describe, encode
from hpccl.data.shards.labels import Labels
from hpccl.data.shards.lost import LOCK, has_size, locked, lost_shards, refuse_changed
from hpccl.data.shards.manifest import (
    FORMAT,
    INDEX,
    MANIFEST,
    UNFINISHED,
    Index,
    Manifest,
    ShardEntry,
    SkippedImage,
    splits,
)
from hpccl.data.shards.sources import SPLITS, Listing, Member, SourceReader, sample_key, scan
from hpccl.data.shards.write import ShardWriter
from hpccl.errors import ConfigError, DataError, FolderError
from hpccl.folder import explain_os_error, replacing

__all__ = ["Progress", "build"]

BadImages = Literal["stop", "skip"]

_PLAN = "plan.json"


class Progress(NamedTuple):
    """The progress of a build, in images of all splits; shard: the one just finished (None: found at the start)."""

    done: int
    total: int
    shard: str | None


def build(
    source: Path,
    out: Path,
    *,
    split: str | None = None,
    encoding: Encoding = Original(),  # noqa: B008  (frozen)
    samples_per_shard: int = 2500,
    workers: int = 1,
    bad_images: BadImages = "stop",
    labels: Labels | None = None,
    checksum: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Manifest]:
    """Write `out/<split>/` for every split of the source.

    Args:
        source: image folder, zip, tar, or tar (or folder) of per-class tars.
        out: a new folder, or one left by an interrupted or finished build of the same source.
        split: only this split; for a source without splits, the name to give it (default `train`).
        encoding: how images are stored.
        samples_per_shard: the maximum; a class with more is cut into equal shards.
        workers: processes (spawned: a script must have the usual `if __name__ == "__main__"`).
        bad_images: what to do about an image that cannot be decoded: `stop`, or `skip` and note it in the manifest.
        labels: classes of the images, for a source without class folders.
        checksum: of the source, such as `sha256:<hexadecimal>`; it is read once before anything is written.
        progress: called after every shard.
        note: called with what a user should know of the source, such as files that were left out.

    Returns:
        The manifest of every split.

    Raises:
        ConfigError: an argument makes no sense.
        DataError: unusable source, undecodable image, or `out` holds something else (the message says what differs).
        FolderError: `out` cannot be written (disk full, no permission).
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}; allowed: a positive number")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"'{out}' lies in '{source}', where shards would be taken for images: give a folder outside it"
        )
    if checksum is not None:
        check_source(source, checksum, out)
    listing = _choose(scan(source, labels, note=note), split, source)
    classes = tuple(sorted({name for by_class in listing.values() for name in by_class}))
    plans = [
        _Plan(source, out / name, encoding, samples_per_shard, bad_images, classes, by_class)
        for name, by_class in listing.items()
    ]
    for plan in plans:
        plan.check_folder()
        if labels is not None:
            _check_labelled(plan, out, labels)
    counter = _Counter(sum(len(unit.members) for plan in plans for unit in plan.units), progress)
    return _run(plans, workers, counter)


def _check_labelled(plan: _Plan, out: Path, labels: Labels) -> None:
    """Compare the classes with those of other splits: a wrong list of labels would only show as a bad accuracy."""
    for other in splits(out):
        known = Manifest.load(out / other).classes
        strange = sorted(set(plan.classes) - set(known))
        if other != plan.folder.name and strange:
            raise DataError(
                f"'{labels.file}' gives the class '{strange[0]}', which split '{other}' in '{out}' lacks "
                f"({len(strange)} of {len(plan.classes)} classes are unknown there): give the labels as names of "
                "its classes"
            )


def _choose(listing: Listing, split: str | None, source: Path) -> Listing:
    if split is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ConfigError(f"split is '{split}'; allowed: letters, digits, '-' and '_'")
    if list(listing) == [""]:
        return {split or "train": listing[""]}
    if split is None:
        return {name: listing[name] for name in SPLITS if name in listing}
    if split not in listing:
        raise ConfigError(f"'{source}' has no split '{split}': it has {', '.join(sorted(listing))}")
    return {split: listing[split]}


# ---------------------------------------------------------------- the plan of one split


@dataclass(frozen=True)
class _Unit:
    """One shard to be written."""

    source: Path
    folder: Path
    stem: str
    class_name: str
    label: int
    members: tuple[Member, ...]
    keys: tuple[str, ...]
    encoding: Encoding
    bad_images: BadImages
    expected: ShardEntry | None = None  # the entry of a lost shard that is written again

    @property
    def file(self) -> Path:
        return self.folder / f"{self.stem}.tar"

    @property
    def note(self) -> Path:
        return self.folder / UNFINISHED / f"{self.stem}.json"


@dataclass(frozen=True, eq=False)
class _Plan:
    """The images of one split, and its folder."""

    source: Path
    folder: Path
    encoding: Encoding
    samples_per_shard: int
    bad_images: BadImages
    classes: tuple[str, ...]
    by_class: Mapping[str, list[Member]]

    @cached_property
    def units(self) -> list[_Unit]:
        """The shards in the order of the manifest."""
        return [unit for label, name in enumerate(self.classes) for unit in self._units_of_class(label, name)]

    def _units_of_class(self, label: int, name: str) -> Iterator[_Unit]:
        members = self.by_class.get(name, [])
        keys = _sample_keys(members)
        count = -(-len(members) // self.samples_per_shard)
        for part in range(count):
            inside = slice(len(members) * part // count, len(members) * (part + 1) // count)
            yield _Unit(
                source=self.source,
                folder=self.folder,
                stem=f"c{label:04d}-{part:03d}",
                class_name=name,
                label=label,
                members=tuple(members[inside]),
                keys=tuple(keys[inside]),
                encoding=self.encoding,
                bad_images=self.bad_images,
            )

    @cached_property
    def listing(self) -> str:
        """SHA-256 of the names and sizes of all images."""
        digest = hashlib.sha256()
        for unit in self.units:
            for member in unit.members:
                digest.update(f"{unit.class_name}\0{member.name}\0{member.size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def manifest(
        self, shards: tuple[ShardEntry, ...], index: tuple[int, str], skipped: tuple[SkippedImage, ...]
    ) -> Manifest:
        """Make the manifest of the split from these parts."""
        return Manifest(
            split=self.folder.name,
            source=self.source.resolve().name,
            listing=self.listing,
            encoding=describe(self.encoding),
            samples_per_shard=self.samples_per_shard,
            classes=self.classes,
            shards=shards,
            index_bytes=index[0],
            index_sha256=index[1],
            skipped=skipped,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that determines the shards' bytes."""
        return self.manifest((), (0, ""), ()).identity()

    def check_folder(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            DataError: it does; the message says what differs.
        """
        if (self.folder / MANIFEST).exists():
            self._compare(Manifest.load(self.folder).identity())
        elif (self.folder / UNFINISHED / _PLAN).exists():
            self._compare(_load_json(self.folder / UNFINISHED / _PLAN))
        elif self.folder.is_dir() and any(entry.name not in (UNFINISHED, LOCK) for entry in self.folder.iterdir()):
            raise DataError(f"'{self.folder}' is not empty and was not written by this command: choose another folder")
        elif self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"'{self.folder}' is a file: choose another folder")

    def _compare(self, there: dict[str, Any]) -> None:
        differences = [
            f"{name} is {_short(there.get(name))} there and {_short(value)} now"
            for name, value in self.identity.items()
            if there.get(name) != value
        ]
        if differences:
            raise DataError(
                f"'{self.folder}' holds shards of another build: {'; '.join(differences)}. "
                "Choose another folder, or delete this one"
            )

    def finished(self) -> Manifest | None:
        """Return the manifest of an earlier, complete build; None without one.

        Raises:
            DataError: images were skipped then and may not be now, or the index is missing.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        manifest = Manifest.load(self.folder)
        self._refuse_skipped(manifest.skipped)
        if not has_size(self.folder / INDEX, manifest.index_bytes):
            raise DataError(
                f"'{self.folder / INDEX}' of a finished build is missing or truncated: delete '{self.folder}' and run "
                "the same command again"
            )
        return manifest

    def missing(self, manifest: Manifest | None) -> list[_Unit]:
        """Return the shards that are not written yet; of a finished build, those that are gone or of another size."""
        if manifest is None:
            return [unit for unit in self.units if not _is_done(unit)]
        lost = lost_shards(self.folder, manifest)
        return [replace(unit, expected=lost[unit.file.name]) for unit in self.units if unit.file.name in lost]

    def is_whole(self) -> bool:
        """Whether there is nothing to do."""
        manifest = None if (self.folder / UNFINISHED).exists() else self.finished()
        return manifest is not None and not self.missing(manifest)

    def tidy(self) -> None:
        """Delete files that a killed build left half written, or had not removed after writing the manifest."""
        for half in self.folder.glob(".*.part"):
            half.unlink(missing_ok=True)
        if (self.folder / MANIFEST).exists():
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)

    def _refuse_skipped(self, skipped: tuple[SkippedImage, ...]) -> None:
        if skipped and self.bad_images == "stop":
            raise DataError(f"{skipped[0].reason}. {_BAD_IMAGE_ADVICE}")

    def finish(self) -> Manifest:
        """Write index and manifest from the notes, then delete the notes."""
        notes = [_load_json(unit.note) for unit in self.units]
        skipped = tuple(SkippedImage(*pair) for note in notes for pair in note["skipped"])
        self._refuse_skipped(skipped)
        index = Index.of([tuple(row) for note in notes for row in note["rows"]]).save(self.folder)
        shards = tuple(ShardEntry(**note["shard"]) for note in notes if note["rows"])
        manifest = self.manifest(shards, index, skipped)
        manifest.save(self.folder)
        self.tidy()  # half-written files again: processes of a killed build live on for some milliseconds
        return manifest


def _sample_keys(members: list[Member]) -> list[str]:
    """Return a unique key for each image of a class."""
    taken: set[str] = set()
    next_number: dict[str, int] = {}
    keys = []
    for member in members:
        key = stem = sample_key(member.name)
        while key in taken:
            next_number[stem] = next_number.get(stem, 1) + 1
            key = f"{stem}-{next_number[stem]}"
        taken.add(key)
        keys.append(key)
    return keys


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}{', ...' if len(value) > 3 else ''})"
    text = repr(value) if not isinstance(value, dict) else " ".join(f"{key}={value[key]}" for key in value)
    return text if len(text) <= 40 else f"{text[:12]}..."


# ---------------------------------------------------------------- running a plan


class _Counter:
    """Adds up progress over splits."""

    def __init__(self, total: int, report: Callable[[Progress], None] | None) -> None:
        self.total = total
        self.done = 0
        self.report = report

    def skip(self, missing: int) -> None:
        """Count all but `missing` images as stored by an earlier run."""
        self.done = self.total - missing
        if self.report is not None and self.done:
            self.report(Progress(self.done, self.total, None))

    def add(self, unit: _Unit) -> None:
        self.done += len(unit.members)
        if self.report is not None:
            self.report(Progress(self.done, self.total, f"{unit.folder.name}/{unit.stem}"))


def _run(plans: list[_Plan], workers: int, counter: _Counter) -> dict[str, Manifest]:
    with contextlib.ExitStack() as locks:
        for plan in plans:
            if not plan.is_whole():
                locks.enter_context(locked(plan.folder))
                plan.tidy()
        known = {plan: plan.finished() for plan in plans}  # another build may have ended before we had the lock
        for plan, manifest in known.items():
            if manifest is None:
                _prepare(plan)
        missing = [unit for plan, manifest in known.items() for unit in plan.missing(manifest)]
        counter.skip(sum(len(unit.members) for unit in missing))
        for unit in _write_all(missing, workers):
            counter.add(unit)
        return {plan.folder.name: manifest or plan.finish() for plan, manifest in known.items()}


def _prepare(plan: _Plan) -> None:
    folder = plan.folder / UNFINISHED
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FolderError(f"'{folder}' cannot be made: {explain_os_error(error)}") from error
    if not (folder / _PLAN).exists():
        with replacing(folder / _PLAN) as path:
            path.write_text(json.dumps({"format": FORMAT, **plan.identity}))


def _is_done(unit: _Unit) -> bool:
    if not unit.note.exists():
        return False
    note = _load_json(unit.note)
    return not note["rows"] or has_size(unit.file, note["shard"]["bytes"])


def _write_all(units: list[_Unit], workers: int) -> Iterator[_Unit]:
    """Write shards; yield each when it is done."""
    workers = min(workers, len(units))
    if workers <= 1:
        for unit in units:
            _write_shard(unit)
            yield unit
        return
    # Spawned, because the caller may have threads (a progress bar), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        jobs = {pool.submit(_write_shard, unit): unit for unit in units}
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]
    except BrokenProcessPool as error:
        raise DataError(
            "a process that wrote shards died (killed, or out of memory?): run the same command again, it continues "
            "where it stopped; fewer --workers need less memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end this process when the parent dies, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------- writing one shard


_BAD_IMAGE_ADVICE = "Repair or remove it, or skip bad images (--skip-bad)"


def _write_shard(unit: _Unit) -> None:
    """Write the tar, then the note about it.

    Raises:
        DataError: an image cannot be read or decoded, or a lost shard differs from what it was.
        FolderError: the disk is full, or the folder cannot be written.
    """
    with replacing(unit.file) as path:
        with path.open("wb") as file, closing(ShardWriter(file, unit.label)) as writer:
            skipped = _write_samples(unit, writer)
        shard = writer.entry(unit.file.name, unit.class_name)
        if unit.expected is not None:
            refuse_changed(unit.file, shard, unit.expected)
    if unit.expected is not None:
        return  # it is in the manifest already
    if not writer.rows:
        unit.file.unlink()
    with replacing(unit.note) as path:
        path.write_text(json.dumps({"shard": vars(shard), "rows": writer.rows, "skipped": skipped}))


def _write_samples(unit: _Unit, writer: ShardWriter) -> list[tuple[str, str]]:
    """Write the images; return (name, reason) of those that were skipped."""
    skipped = []
    with closing(SourceReader(unit.source)) as reader:
        for key, member in zip(unit.keys, unit.members, strict=True):
            data = reader.read(member)
            try:
                image = encode(data, member.name, unit.encoding)
            except DataError as error:
                if unit.bad_images == "stop":
                    raise DataError(f"{error}, in '{unit.source}'. {_BAD_IMAGE_ADVICE}") from error
                skipped.append((member.name, str(error)))
                continue
            writer.add(key, image.extension, image.data, width=image.width, height=image.height)
    return skipped


def _load_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}): delete '{path.parent.parent}' and build again") from error
    assert isinstance(document, dict)
    return document
