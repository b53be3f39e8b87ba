"""The command `hpccl`: parse, call, print. Only commands that need torch import it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

import hpccl
from hpccl.cli import jobs, results, training
from hpccl.cli.curvature import curvature
from hpccl.cli.gp import gp
from hpccl.cli.memory import memory
from hpccl.cli.shards import shards
from hpccl.cluster.outcome import INTERRUPTED, tell
from hpccl.cluster.step import end, in_step
from hpccl.errors import CapacityError, FolderError, HpcclError
from hpccl.folder import explain_os_error, may_pass
from hpccl.machine import out_of_memory
from hpccl.output import Told, flush, say

__all__ = ["app", "main"]

# What the user can mend; others may be mistakes of ours, whose traceback is needed.
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOLCK),
}

app = typer.Typer(
    name="hpccl",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Continual learning of image classifiers on a stream of tasks.",
)
for command in (
    *(training.train, training.adapt, training.extend),
    *(jobs.submit, jobs.status, jobs.logs, jobs.cancel),
    *(training.check, training.plan),
    *(results.evaluate, results.report, results.choose, results.export, results.merge, results.doctor),
):
    app.command()(command)
for group, name in ((shards, "shards"), (curvature, "curvature"), (memory, "memory"), (gp, "gp")):
    app.add_typer(group, name=name)


def main() -> None:
    """Run the command and exit.

    Exit codes: 0 done; 1 failed; 2 wrong command or configuration; 75 stopped and saved, the same command continues;
    130 interrupted by Ctrl-C, before training handles it or by a second one.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal's encoding lacks a character of a table
    try:
        with contextlib.redirect_stdout(Told(sys.stdout)) as told:
            try:
                app(args=[_expanded(argument) for argument in sys.argv[1:]])
            finally:
                told.flush()
    except HpcclError as error:
        _leave(tell(error))
    except (MemoryError, RuntimeError) as error:
        words = out_of_memory(error)
        if words is None:
            raise
        _leave(tell(CapacityError(f"memory ran out ({words}); free some, or use a machine or device with more")))
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE and not may_pass(error):
            raise
        named = "" if error.filename is None else f"'{os.fsdecode(error.filename)}': "
        _leave(tell(FolderError(f"{named}{explain_os_error(error, other='another path')}")))
    except KeyboardInterrupt:
        say("stopped by Ctrl-C; run the same command again")
        sys.exit(INTERRUPTED)
    finally:
        flush()


def _expanded(argument: str) -> str:
    """Return an argument with the home folder in `--option=~/path`, which shells leave as it is."""
    option, sign, path = argument.partition("=")
    is_path = sign and option.startswith("--") and path.startswith("~")
    return f"{option}={os.path.expanduser(path)}" if is_path else argument


def _leave(code: int) -> NoReturn:
    """Exit; in a SLURM step, with a code that exceeds those of the ranks that `srun` then kills."""
    if in_step():
        end(code)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpccl {hpccl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
