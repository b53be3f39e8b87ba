"""A real SLURM cluster of several nodes inside one Linux machine, for tests and to play with.

    testbed.py install                        the Debian packages (no daemon is started by them)
    testbed.py up [-d DIR] [--nodes 2] ...    munge, slurmctld, and a slurmd for each node
    testbed.py exec [-d DIR] -- COMMAND...    run on the login host, or with --node n1 on a node
    testbed.py status | down [-d DIR]
    testbed.py kill-slurmd | start-slurmd n2  SIGKILL, start: the SLURM daemon of a node; its jobs go on
    testbed.py kill-node | start-node n2      power off, power on: every process of a node
    testbed.py link n2 down | up              pull, plug the network cable of a node
    testbed.py kill-ctl | start-ctl           SIGKILL, start: slurmctld

With DIR/hostbin first in PATH, sbatch, srun, squeue and the others work from the machine itself.

How it is built. The login host `ctl` is a process with namespaces of its own (files, network, host name, processes):
it holds munged, slurmctld and a bridge without a route out. Each node is the same again, nested in ctl and plugged into
the bridge: an address, a host name, process numbers and a /dev/shm of its own. /etc/hosts and /etc/slurm are other
files inside the namespaces only, so nothing of the machine changes, and SIGKILL of the one process `ctl` ends every
process there is.

Python's standard library is all it needs; it runs as root.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import stat
import string
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Settings", "Testbed", "TestbedError", "install", "main", "missing_programs", "obstacle"]

_HERE = Path(__file__).resolve().parent
_NETWORK = "10.231.77"  # exists inside the namespaces only
_CONTROLLER = "ctl"
_NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")
_PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
_COMMANDS = ("sbatch", "srun", "salloc", "scancel", "scontrol", "squeue", "sinfo", "sacct", "sacctmgr", "sstat")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LONGEST = 60  # characters of DIR: the path of a unix socket below it must stay under 108

# Process 1 of a host. bash reaps the orphans of slurmd, as an init must.
_INIT = """\
mount -t tmpfs -o size=4g tmpfs /dev/shm
ip link set lo up
hostname {name}
while :; do sleep 3600 & wait $!; done
"""


class TestbedError(Exception):
    """The cluster cannot be brought up or used; the message says what to do."""

    __test__ = False  # no class of tests


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the cluster claims to be.

    nodes: they are called n1, n2, ...
    cpus, memory, gpus: of each node; memory in MiB. They are claims: the machine need not have them. GPUs are device
        files that nothing answers on; jobs that ask for them get CUDA_VISIBLE_DEVICES.
    grace: seconds between the warning and the end of a preempted job
    accounting: `shim` answers sacct from slurmctld's memory, `none` has a sacct that fails as without slurmdbd
    overrides: KEY=VALUE lines of slurm.conf
    """

    nodes: int = 2
    cpus: int = 4
    memory: int = 8000
    gpus: int = 2
    grace: int = 10
    accounting: str = "shim"
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Process:
    """A process that is told from a later one with the same number by the time of its start."""

    pid: int
    started: int

    def alive(self) -> bool:
        return _started(self.pid) == self.started

    def kill(self) -> None:
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)


class Testbed:
    """A cluster in the folder `directory`.

    `with Testbed("/tmp/tb", Settings(nodes=3)) as cluster:` brings it up and, whatever happens, takes it down: the
    kernel ends it with this process too.
    """

    __test__ = False  # no class of tests

    def __init__(self, directory: str | Path, settings: Settings | None = None) -> None:
        self.directory = Path(directory).resolve()
        self.settings = settings or Settings()
        self._processes: dict[str, _Process] = {}
        self._started_here: list[subprocess.Popen[bytes]] = []  # to be reaped

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The cluster that is up in `directory`.

        Raises:
            TestbedError: none is.
        """
        cluster = cls(directory)
        try:
            state = json.loads(cluster._state_file.read_text())
        except FileNotFoundError:
            raise TestbedError(f"no cluster is up in '{directory}'; `up -d {directory}` starts one") from None
        state["settings"]["overrides"] = tuple(state["settings"]["overrides"])
        cluster.settings = Settings(**state["settings"])
        cluster._processes = {name: _Process(*numbers) for name, numbers in state["processes"].items()}
        return cluster

    def __enter__(self) -> Self:
        self.up(end_with_this_process=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # ------------------------------------------------------------ use

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{number}" for number in range(1, self.settings.nodes + 1)]

    @property
    def search_path(self) -> str:
        """A PATH by which processes of this machine find this cluster's sbatch, srun, ..."""
        return f"{self.directory / 'hostbin'}:{os.environ.get('PATH', '')}"

    def environment(self) -> dict[str, str]:
        """This process's environment for use inside the cluster, without traces of another SLURM job."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        ours = str(self.directory / "hostbin")
        kept["PATH"] = ":".join(p for p in (ours, *kept.get("PATH", "").split(":"), _SYSTEM_PATH) if p)
        return kept

    def enter(self, host: str = _CONTROLLER, folder: str | Path | None = None) -> list[str]:
        """The beginning of a command line that runs what follows on `host`, in `folder` (here, by default)."""
        goto = 'cd "$0" && exec "$@"'
        return [*_inside(self._pid(host)), "--", "sh", "-c", goto, str(folder or Path.cwd())]

    def run(
        self, command: Sequence[str | Path], host: str = _CONTROLLER, *, timeout: float | None = 120, check: bool = True
    ) -> str:
        """What `command` prints on `host`.

        Raises:
            TestbedError: it failed and `check` is true.
        """
        return _run([*self.enter(host), *map(str, command)], env=self.environment(), timeout=timeout, check=check)

    def node_states(self) -> dict[str, str]:
        """State of each node as sinfo tells it: idle, mixed, allocated, down, ..., with * where it does not answer."""
        told = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"], check=False)
        return dict(line.split() for line in told.splitlines() if len(line.split()) == 2)

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until every node is up and has nothing to do."""
        _wait_for(
            "all nodes to be idle",
            lambda: [self.node_states().get(node) for node in self.nodes] == ["idle"] * self.settings.nodes,
            timeout,
            pause=0.1,
        )

    def processes(self) -> dict[str, tuple[int, bool]]:
        """(process number on the machine, alive) of each daemon, and of each host by its name."""
        return {
            name: (process.pid, process.alive())
            for name, process in self._processes.items()
            if not name.endswith(".outside")
        }

    # ------------------------------------------------------------ faults

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL of a node's SLURM daemon. What runs on the node goes on."""
        self._kill(f"slurmd-{self._known(node)}")

    def start_slurmd(self, node: str) -> None:
        """Start a node's SLURM daemon."""
        (self.directory / "spool" / self._known(node)).mkdir(parents=True, exist_ok=True)
        self._start_daemon(f"slurmd-{node}", ["slurmd", "-D", "-N", node], node)

    def power_off(self, node: str) -> None:
        """End every process of a node at once."""
        self._kill(self._known(node))
        _wait_for(f"the end of {node}", lambda: not self._alive(f"slurmd-{node}"), 10)

    def power_on(self, node: str) -> None:
        """Start a node and its SLURM daemon."""
        number, cable = self.nodes.index(self._known(node)) + 1, f"v-{node}"
        self._start_host(node)
        controller, host = str(self._pid(_CONTROLLER)), str(self._pid(node))
        # `ip` acts in ctl's network but counts processes as the machine does: `netns` takes the machine's number.
        ip = ["nsenter", "-t", controller, "--net", "ip"]
        _wait_for(f"the former cable of {node} to go", lambda: cable not in _run([*ip, "-o", "link"]), 10)
        # Like a machine it keeps its network address: the others remember that, and would send to the former one.
        address = f"02:00:00:00:00:{number:02x}"
        _run([*ip, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "address", address, "netns", host])
        _run([*ip, "link", "set", cable, "master", "br0", "up"])
        _run(["nsenter", "-t", host, "--net", "ip", "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0"])
        _run(["nsenter", "-t", host, "--net", "ip", "link", "set", "eth0", "up"])
        self.start_slurmd(node)

    def link(self, node: str, *, up: bool) -> None:
        """Plug or pull the network cable of a node. Nobody is told that connections are cut."""
        cable = f"v-{self._known(node)}"
        controller = str(self._pid(_CONTROLLER))
        _run(["nsenter", "-t", controller, "--net", "ip", "link", "set", cable, "up" if up else "down"])

    def kill_controller(self) -> None:
        """SIGKILL of slurmctld. It forgets what happened in the last 5 seconds, jobs submitted then included."""
        self._kill("slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._start_daemon("slurmctld", ["slurmctld", "-D"])

    def mend(self, timeout: float = 60) -> None:
        """Plug in every cable, start whatever is dead, and wait until every node is idle."""
        if not self._alive("slurmctld"):
            self.start_controller()
        for node in self.nodes:
            if not self._alive(node):
                self.power_on(node)
            elif not self._alive(f"slurmd-{node}"):
                self.start_slurmd(node)
            self.link(node, up=True)
        self.wait_idle(timeout)

    # ------------------------------------------------------------ up and down

    def up(self, *, end_with_this_process: bool = False, timeout: float = 60) -> None:
        """Bring the cluster up and wait until every node is idle.

        Raises:
            TestbedError: it cannot be; what was started is ended.
        """
        self._check()
        self._write_files()
        try:
            self._start_controller_host(end_with_this_process)
            self._start_munge()
            self.start_controller()
            for node in self.nodes:
                self.power_on(node)
            self._write_commands()
            self.wait_idle(timeout)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every process. The logs stay.

        Raises:
            TestbedError: a process would not end.
        """
        # What started it reaps it and ends. Killed too, it might leave a zombie to a process 1 that reaps none.
        for name in (_CONTROLLER, f"{_CONTROLLER}.outside"):
            if name in self._processes:
                self._processes[name].kill()
                break
        _wait_for("every process to end", lambda: not any(map(_Process.alive, self._processes.values())), 20)
        for started in self._started_here:
            started.wait(timeout=20)
        self._started_here.clear()
        shutil.rmtree(self.directory / "hostbin", ignore_errors=True)
        self._state_file.unlink(missing_ok=True)
        self._processes.clear()

    def _check(self) -> None:
        place = str(self.directory)
        if reason := obstacle():
            raise TestbedError(reason)
        if len(place) > _LONGEST or not re.fullmatch(r"[\w./-]+", place):
            raise TestbedError(
                f"DIR '{place}' has {len(place)} characters; allowed: {_LONGEST}, of letters, digits and ./_- "
                "(unix sockets below it have short names); choose another, such as -d /tmp/tb"
            )
        if place.startswith("/dev/"):
            raise TestbedError(f"DIR '{place}' would differ from node to node; choose another, such as -d /tmp/tb")
        if self._state_file.exists():
            former = self.load(self.directory)
            if former._alive(_CONTROLLER):
                raise TestbedError(f"a cluster is up in '{place}' already; use it, or end it with `down -d {place}`")

    # ------------------------------------------------------------ files

    @property
    def _state_file(self) -> Path:
        return self.directory / "run" / "testbed.json"

    def _save(self) -> None:
        processes = {name: dataclasses.astuple(process) for name, process in self._processes.items()}
        content = {"settings": dataclasses.asdict(self.settings), "processes": processes}
        part = self._state_file.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.replace(self._state_file)

    def _write_files(self) -> None:
        for name in ("state", "spool", "run"):  # of an earlier cluster: its jobs are gone
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in ("run", "log", "state", "spool", "slurm", "etc", "dev"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        key = self.directory / "etc" / "munge.key"
        key.unlink(missing_ok=True)
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for number in range(self.settings.gpus):
            device = self.directory / "dev" / f"gpu{number}"
            if not device.is_char_device():  # SLURM wants a device file; a twin of /dev/null will do
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.directory / "slurm" / "slurm.conf").write_text(self._slurm_conf())
        devices = f"Name=gpu File={self.directory}/dev/gpu[0-{self.settings.gpus - 1}]\n" if self.settings.gpus else ""
        (self.directory / "slurm" / "gres.conf").write_text(devices)
        hosts = [f"{_NETWORK}.254 {_CONTROLLER}", *(f"{_NETWORK}.{k} {node}" for k, node in enumerate(self.nodes, 1))]
        content = "\n".join(["127.0.0.1 localhost", "::1 localhost ip6-localhost", *hosts])
        (self.directory / "etc" / "hosts").write_text(f"{content}\n")

    def _slurm_conf(self) -> str:
        settings = self.settings
        gpus = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
        nodes = [
            f"NodeName={node} NodeAddr={_NETWORK}.{number} CPUs={settings.cpus} RealMemory={settings.memory}{gpus}"
            for number, node in enumerate(self.nodes, start=1)
        ]
        template = string.Template((_HERE / "slurm.conf.in").read_text())
        lines = template.substitute(
            network=_NETWORK, directory=self.directory, nodes="\n".join(nodes), grace=settings.grace
        ).splitlines()
        for override in settings.overrides:
            name = override.partition("=")[0]
            lines = [override, *(line for line in lines if line.partition("=")[0] != name)]
        return "\n".join(lines) + "\n"

    def _write_commands(self) -> None:
        """hostbin/: SLURM's commands for processes outside the namespaces. Inside they are SLURM's own."""
        folder = self.directory / "hostbin"
        folder.mkdir(exist_ok=True)
        enter = shlex.join(self.enter(folder="/")[:-1])
        for name in _COMMANDS:
            target = shutil.which(name, path=_SYSTEM_PATH) or name
            if name == "sacct" and self.settings.accounting == "shim":
                target = shlex.join([sys.executable, "-I", str(_HERE / "sacct.py")])
            script = (
                "#!/bin/sh\n"
                f"if [ -e /etc/slurm/gres.conf ] && [ /etc/slurm/slurm.conf -ef {self.directory}/slurm/slurm.conf ]\n"
                f'then exec {target} "$@"\n'
                f'else exec {enter} "$PWD" {target} "$@"\n'
                "fi\n"
            )
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)

    # ------------------------------------------------------------ processes

    def _known(self, node: str) -> str:
        if node not in self.nodes:
            raise TestbedError(f"no node is called '{node}'; there are {', '.join(self.nodes)}")
        return node

    def _alive(self, name: str) -> bool:
        return name in self._processes and self._processes[name].alive()

    def _pid(self, name: str) -> int:
        if not self._alive(name):
            raise TestbedError(f"'{name}' is not running in '{self.directory}'")
        return self._processes[name].pid

    def _kill(self, name: str) -> None:
        os.kill(self._pid(name), signal.SIGKILL)
        _wait_for(f"the end of {name}", lambda: not self._alive(name), 10)

    def _note(self, name: str, pid: int) -> None:
        self._processes[name] = _Process(pid, _started(pid) or 0)
        self._save()

    def _popen(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started_here.append(process)
        self._note(f"{name}.outside", process.pid)
        return process

    def _descendant(self, name: str, process: subprocess.Popen[bytes], depth: int) -> int:
        """Wait for the only descendant `depth` generations below `process`.

        Raises:
            TestbedError: it ended; the message has the end of its log.
        """

        def find() -> int | None:
            if process.poll() is not None:
                log = (self.directory / "log" / f"{name}.out").read_text(errors="replace")
                raise TestbedError(f"{name} ended at once: {log[-2000:].strip()}")
            pid = process.pid
            for _ in range(depth):
                below = _children(pid)
                if not below:
                    return None
                pid = below[0]
            return pid

        return _wait_for(f"the process {name}", find, 20)

    def _start_daemon(self, name: str, command: Sequence[str], host: str = _CONTROLLER) -> None:
        if self._alive(name):
            raise TestbedError(f"{name} is running already")
        process = self._popen(name, [*self.enter(host, "/"), *command])
        self._note(name, self._descendant(name, process, 1))  # nsenter starts it

    def _start_host(self, name: str, *, before: Sequence[str] = ()) -> None:
        """Start process 1 of a host in namespaces of its own: its power."""
        if self._alive(name):
            raise TestbedError(f"{name} is running already")
        outer = [] if name == _CONTROLLER else [*_inside(self._pid(_CONTROLLER)), "--"]
        make = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        process = self._popen(name, [*before, *outer, *make, "bash", "-c", _INIT.format(name=name)])
        self._note(name, self._descendant(name, process, 2 if outer else 1))  # [nsenter,] unshare
        pid = str(self._pid(name))
        _wait_for(f"host {name}", lambda: _run(["nsenter", "-t", pid, "--uts", "hostname"]).strip() == name, 20)

    def _start_controller_host(self, end_with_this_process: bool) -> None:
        leash = ["setpriv", "--pdeathsig", "KILL"] if end_with_this_process else []
        self._start_host(_CONTROLLER, before=leash)
        inside = ["nsenter", "-t", str(self._pid(_CONTROLLER))]
        _run([*inside, "--mount", "mount", "--bind", str(self.directory / "etc" / "hosts"), "/etc/hosts"])
        _run([*inside, "--mount", "mount", "--bind", str(self.directory / "slurm"), "/etc/slurm"])
        _run([*inside, "--net", "ip", "link", "add", "br0", "type", "bridge"])
        _run([*inside, "--net", "ip", "addr", "add", f"{_NETWORK}.254/24", "dev", "br0"])
        _run([*inside, "--net", "ip", "link", "set", "br0", "up"])

    def _start_munge(self) -> None:
        run, log, etc = (self.directory / name for name in ("run", "log", "etc"))
        command = ["munged", "--force", "--foreground", f"--socket={run}/munge.sock", f"--key-file={etc}/munge.key"]
        command += [f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={run}/munge.seed"]
        self._start_daemon("munged", command)  # one for all: the socket is a file, and files are shared
        _wait_for("munged", (run / "munge.sock").is_socket, 20)


# ---------------------------------------------------------------- the machine


def missing_programs() -> list[str]:
    """What must be installed and is not."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]


def obstacle() -> str | None:
    """Why there can be no cluster on this machine, and what to do; None where there can."""
    if os.geteuid() != 0:
        return "only root may make namespaces for the nodes; run the same command with sudo"
    if absent := missing_programs():
        return f"not installed: {', '.join(absent)}; `python {__file__} install` does it on Debian"
    try:
        _run(["unshare", *_NAMESPACES, "--fork", "--mount-proc", "true"])
    except TestbedError as error:
        return f"this machine makes no namespaces ({error}); in a container, start that with --privileged"
    return None


def install() -> None:
    """Install the Debian packages; none of their daemons is started.

    Raises:
        TestbedError: not root, or this is no Debian.
    """
    if not missing_programs():
        return
    if shutil.which("apt-get") is None:
        raise TestbedError(f"no apt-get here; install what has these programs: {', '.join(missing_programs())}")
    if os.geteuid() != 0:
        raise TestbedError("only root may install packages; run the same command with sudo")
    policy = Path("/usr/sbin/policy-rc.d")  # Debian's way to forbid packages to start daemons
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _run(["apt-get", "update", "-qq"], env=environment, timeout=300)
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_PACKAGES], env=environment, timeout=600)
    finally:
        if ours:
            policy.unlink()


def _inside(pid: int) -> list[str]:
    return ["nsenter", "-t", str(pid), *_NAMESPACES]


_Found = TypeVar("_Found")


def _run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float | None = 60, check: bool = True
) -> str:
    """What it prints. Raises TestbedError if it fails and `check` is true."""
    done = subprocess.run(
        command, env=env, timeout=timeout, check=False, text=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    if check and done.returncode:
        raise TestbedError(f"`{shlex.join(command)}` failed with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _wait_for(what: str, find: Callable[[], _Found | None], timeout: float, *, pause: float = 0.02) -> _Found:
    """The first thing found that counts as true. Raises TestbedError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := find()):
        if time.monotonic() > deadline:
            raise TestbedError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(pause)
    return found


# ---------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ("install", "up", "down", "status", "exec")
    faults = ("kill-slurmd", "start-slurmd", "kill-node", "start-node", "link", "kill-ctl", "start-ctl")
    parser.add_argument("command", choices=(*commands, *faults), metavar="COMMAND", help="see above")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="a node, and for `link`: up or down")
    parser.add_argument("-d", "--dir", default="/tmp/slurm-testbed", help="folder of the cluster (%(default)s)")
    parser.add_argument("--node", default=_CONTROLLER, help="where `exec` runs (%(default)s, the login host)")
    default = Settings()
    group = parser.add_argument_group("up")
    group.add_argument("--nodes", type=int, default=default.nodes, help="number of nodes (%(default)s)")
    group.add_argument("--cpus", type=int, default=default.cpus, help="that a node claims to have (%(default)s)")
    group.add_argument("--mem", type=int, default=default.memory, help="MiB that a node claims (%(default)s)")
    group.add_argument("--gpus", type=int, default=default.gpus, help="that a node claims (%(default)s)")
    group.add_argument("--grace", type=int, default=default.grace, help="seconds left to preempted jobs (%(default)s)")
    group.add_argument("--acct", choices=("shim", "none"), default=default.accounting, help="sacct (%(default)s)")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a line of slurm.conf")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        nodes=options.nodes,
        cpus=options.cpus,
        memory=options.mem,
        gpus=options.gpus,
        grace=options.grace,
        accounting=options.acct,
        overrides=tuple(options.set),
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _up(options: argparse.Namespace) -> None:
    began = time.monotonic()
    cluster = Testbed(options.dir, _settings(options))
    cluster.up()
    _say(f"up in {time.monotonic() - began:.1f} s: login host {_CONTROLLER}, nodes {', '.join(cluster.nodes)}")
    _say(f"use it:    export PATH={cluster.directory}/hostbin:$PATH; srun -N{options.nodes} hostname")
    _say(f"end it:    python {sys.argv[0]} down -d {options.dir}")


def _status(cluster: Testbed) -> None:
    for name, (pid, alive) in cluster.processes().items():
        _say(f"{name:12} {f'pid {pid}' if alive else 'dead'}")
    _say(cluster.run(["sinfo"], check=False).rstrip())
    _say(cluster.run(["squeue"], check=False).rstrip())


def _break(cluster: Testbed, command: str, arguments: Sequence[str]) -> None:
    """The commands that break and mend; each names its arguments."""
    match [command, *arguments]:
        case ["kill-slurmd", node]:
            cluster.kill_slurmd(node)
        case ["start-slurmd", node]:
            cluster.start_slurmd(node)
        case ["kill-node", node]:
            cluster.power_off(node)
        case ["start-node", node]:
            cluster.power_on(node)
        case ["link", node, ("up" | "down") as wanted]:
            cluster.link(node, up=wanted == "up")
        case ["kill-ctl"]:
            cluster.kill_controller()
        case ["start-ctl"]:
            cluster.start_controller()
        case _:
            raise TestbedError(f"wrong arguments of {command}: {' '.join(arguments) or 'none'}; see --help")


def _act(options: argparse.Namespace, tail: Sequence[str]) -> None:
    match options.command:
        case "install":
            install()
        case "up":
            _up(options)
        case "down":
            Testbed.load(options.dir).down()
        case "status":
            _status(Testbed.load(options.dir))
        case "exec":
            cluster = Testbed.load(options.dir)
            command = [*tail] or options.arguments or ["bash"]
            os.execvpe("nsenter", [*cluster.enter(options.node), *command], cluster.environment())  # noqa: S606 -- a list, no shell
        case command:
            _break(Testbed.load(options.dir), command, options.arguments)


def main(argv: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options: Any = _parser().parse_intermixed_args(argv[:cut])
    try:
        _act(options, argv[cut + 1 :])
    except (TestbedError, OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"testbed: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
