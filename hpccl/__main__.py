"""The command `hpccl`. Its imports take seconds, so they happen where Ctrl-C is caught."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> None:
    """Run the command and exit; see `hpccl.cli.main`."""
    try:
        from hpccl.cli import main

        main()
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C before anything began; run the same command again\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
