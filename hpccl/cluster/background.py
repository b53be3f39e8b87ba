"""Train runs in the background of this machine: `python -m hpccl.cluster.background RUN... -- COMMAND...`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpccl.cluster.outcome import DONE, INTERRUPTED, STOPPED, tell
from hpccl.config.load import load_recorded
from hpccl.errors import FolderError, HpcclError
from hpccl.folder import RunFolder, explain_os_error

__all__ = ["start"]


def start(folders: Sequence[RunFolder], argv: Sequence[str], log: Path) -> int:
    """Train the prepared runs one after the other in a process in a session of its own; return its pid.

    Raises:
        FolderError: the log cannot be written.
    """
    command = [sys.executable, "-m", __name__, *(str(folder.path) for folder in folders), "--", *argv]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    except OSError as error:
        raise FolderError(f"no process can be started with '{log}': {explain_os_error(error)}") from error
    return process.pid


def _main(arguments: Sequence[str]) -> int:
    from hpccl.cluster.local import launch

    split = arguments.index("--")
    folders, argv = arguments[:split], arguments[split + 1 :]
    worst = DONE
    for folder in folders:
        try:
            config = load_recorded(RunFolder(Path(folder)).config)
        except HpcclError as error:
            worst = max(worst, tell(error))
            continue
        code = launch(config, argv=argv)
        if code in (STOPPED, INTERRUPTED):
            return code
        worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
