"""A rank for tests of the launcher: `python fake_worker.py FOLDER BEHAVIOUR`. Needs nothing of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpccl.cluster import worker
from hpccl.errors import ConfigError, DataError, StragglerError, WorldError


def wait(seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.02)


def main() -> int:
    folder, behaviour = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    worker.die_with_parent(int(os.environ["HPCCL_PARENT"]))
    sys.excepthook = worker._on_crash

    def note(name: str) -> None:
        (folder / f"{name}-{rank}").write_text(str(os.getpid()))

    def heard(number: int, _frame: object) -> None:
        note(signal.Signals(number).name)
        if behaviour != "stubborn":
            sys.exit(75)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, heard)
    note("ready")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    print(f"rank {rank}:", *(f"{name}={os.environ[name]}" for name in names), flush=True)
    match behaviour:
        case "done":
            return 0
        case "grandchild":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (folder / f"child-{rank}").write_text(str(child.pid))
        case "crash" if rank == 1:
            try:
                raise RuntimeError("the cause")
            except RuntimeError as error:
                worker._on_crash(type(error), error, error.__traceback__)
            note("told")
            os._exit(1)
        case "crash":
            while not (folder / "told-1").exists():
                time.sleep(0.01)
            raise RuntimeError("connection closed by peer")
        case "lost" if rank == 1:
            while not (folder / "told-0").exists():
                time.sleep(0.01)
            raise RuntimeError("the cause")
        case "lost":
            worker._on_error(WorldError("lost the connection to another rank"))
            note("told")
            os._exit(1)
        case "waited" | "all waited" if rank == 0 or behaviour == "all waited":
            return worker._on_error(StragglerError(f"rank {rank} waited"))
        case "late" if rank == 1:
            while not (folder / "told-0").exists():
                time.sleep(0.01)
            return worker._on_error(WorldError("lost the connection to another rank"))
        case "late":
            worker._on_error(StragglerError(f"rank {rank} waited"))
            note("told")
            os._exit(1)
        case "wait":
            while not (folder / "give up").exists():
                time.sleep(0.01)
            return worker._on_error(StragglerError(f"rank {rank} waited"))
        case "abort" if rank == 0:
            while not (folder / "give up").exists():
                time.sleep(0.01)
            os.abort()
        case "long":
            raise RuntimeError("x" * 1_000_000 + " the end")
        case "data error" if rank == 0:
            return worker._on_error(DataError("image 'x' cannot be decoded"))
        case "config error":
            return worker._on_error(ConfigError("memory too large"))
        case "silent" if rank == 1:
            print("some output before the end", flush=True)
            os._exit(3)
    wait()
    return 0


sys.exit(main())
