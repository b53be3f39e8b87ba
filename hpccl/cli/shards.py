"""`hpccl shards`: build and verify data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpccl.cluster.outcome import FAILED
from hpccl.errors import ConfigError
from hpccl.output import say

if TYPE_CHECKING:
    from hpccl.data.shards.encodings import Encoding

__all__ = ["shards"]

shards = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build and verify data sets of shards.")


@shards.command("build")
def build_shards(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Image folder, zip, tar, or tar of class tars.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or that of an interrupted build.")],
    *,
    split: Annotated[
        str | None, typer.Option(help="Only this split; for a source without splits, the name to give it.")
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(help="Shrink images whose longer side has more pixels; stores JPEG.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="JPEG quality, 1 to 100; stores JPEG.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Store WebP without loss, for small images.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores if not given.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be decoded; otherwise stop at one.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(help="Classes of images without class folders: 'name class' lines, numbers, or ILSVRC's devkit."),
    ] = None,
    synsets: Annotated[
        Path | None, typer.Option(help="For --labels of numbers: a file with one class per line, number 1 first.")
    ] = None,
    checksum: Annotated[
        str | None, typer.Option(metavar="ALGORITHM:HEX", help="Checksum of SOURCE, sha256 or md5; verified first.")
    ] = None,
) -> None:
    """Turn images into shards. If interrupted, the same command continues."""
    from hpccl.data.shards.build import Progress, build
    from hpccl.data.shards.labels import read_labels
    from hpccl.machine import usable_cores

    encoding = _encoding(max_side=max_side, quality=quality, lossless=lossless)
    if synsets is not None and labels is None:
        raise ConfigError("--synsets needs --labels, the file of numbers whose classes it lists; give both")

    def show(progress: Progress) -> None:
        end = "\n" if progress.done == progress.total else "\r"
        line = f"{progress.done} of {progress.total} images"
        if sys.stderr.isatty():
            say(f"{line}\x1b[K", end=end)
        elif progress.shard is not None:
            say(f"{line}, wrote {progress.shard}")

    manifests = build(
        source,
        out,
        split=split,
        encoding=encoding,
        workers=workers or usable_cores(),
        bad_images="skip" if skip_bad else "stop",
        labels=None if labels is None else read_labels(labels, synsets),
        checksum=checksum,
        progress=show,
        note=lambda text: say(f"note: {text}"),
    )
    for name, manifest in manifests.items():
        typer.echo(
            f"{out / name}: {manifest.samples} images of {len(manifest.classes)} classes "
            f"in {len(manifest.shards)} shards, {len(manifest.skipped)} skipped"
        )
        absent = sorted(set(manifest.classes) - {shard.class_name for shard in manifest.shards})
        if absent:
            shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            say(f"note: split '{name}' has no images of {shown}, which another split has")


def _encoding(*, max_side: int | None, quality: int | None, lossless: bool) -> Encoding:
    """Return the encoding of the options; raise ConfigError if they exclude each other."""
    from hpccl.data.shards.encodings import Lossless, Original, Reencode

    if max_side is None and quality is None:
        return Lossless() if lossless else Original()
    if lossless:
        raise ConfigError("--lossless together with --max-side or --quality: choose one way to store images")
    usual = Reencode()
    return Reencode(usual.max_side if max_side is None else max_side, usual.quality if quality is None else quality)


@shards.command("verify")
def verify_shards(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder of shards.")],
    *,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
) -> None:
    """Read every shard and name those that are damaged or missing; exit code 1 if there are any."""
    from hpccl.data.shards.verify import verify

    problems = verify(out, split)
    for problem in problems:
        typer.echo(f"{problem.file}: {problem.what}")
    if problems:
        typer.echo(
            f"{len(problems)} problems. Delete the shards named here (for an index or a manifest, the folder of its "
            f"split), then run the command that built them, hpccl shards build SOURCE {out}: it writes what is missing",
            err=True,
        )
        raise typer.Exit(FAILED)
    typer.echo(f"{out}: all shards match the manifest")
