"""The cost of a step of each method: over fine-tuning with equal rows, and over steps of Avalanche and Mammoth.

Methods are the files of configs/method; `ewc diagonal` has the curvature of their EWC, `lwf same` evaluates the old
network in every step (configs/preset/avalanche/lwf.yaml). Each trains CifarNet (32 px, no dropout), 64 rows per step,
half of them memory if there is one, through the trainer's own functions in one process of one thread. Memory, curvature
and the old network's logits are made by the trainer at the end of the first task; images are in memory already. Methods
that take fine-tuning's step on other rows or weights (joint, separate, gdumb, feature_extraction, finetune_head,
prototypes) are left out, as are topic and fromp, which pass further images through the network in a step.

The opponents are the formulas of Avalanche 0.6.0 and Mammoth, reimplemented for this measurement and run in turns with
ours on the same network, rows and AdamW, without their frameworks (events, loaders, transforms of a buffer's images).
If avalanche-lib is installed (`pip install -c constraints.txt avalanche-lib`), its strategies run in the same turns:
without their loader, against ours on images in memory, and with it, against ours that loads its images in each step.
The formulas:

    avalanche ewc, mas  a loop over the parameters adds sum(F (w - a)^2) to the loss, which is differentiated
    avalanche si        the same, and copies of weights and gradients before and after the step
    avalanche lwf       the old network on each batch, in the mode in which it trained
    avalanche der, ++   one pass over new and memory rows
    mammoth ewc, si     the weights as one vector, whose gradient is written back (ewc) or differentiated (si)
    mammoth lwf         recorded logits
    mammoth er          one pass over new and memory rows
    mammoth der, ++     separate passes for memory, and for memory's labels: 64 and 96 rows for our 64

Ratios are medians over turns of processor seconds, which depend less on other load; also by the clock:

    worst_over_peer       a step of ours over the opponent's, the worst pair
    worst_over_finetune   a step of ours over fine-tuning's, the worst method without another forward pass
    worst_over_library    a step of ours over avalanche-lib's own, the worst pair, where it is installed
    ..._library_loading   the same with the loaders
    again                 fine-tuning against itself: the noise of this measurement
    ..._clock             the same by the clock
    peak_bytes            highest resident memory during steps above what the process had before the network was built,
                          each in a process of its own
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import _avalanche
from benchmarks._common import (
    forget_peak,
    giving_back,
    interleaved,
    median_ratio,
    memory_status,
    print_result,
    spawn,
)
from benchmarks._steps import RandomImages, Steps, make_world, random_stream
from hpccl.config.load import load
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.engine.build import build_engine
from hpccl.models.build import build_model
from hpccl.train.consolidate import consolidate
from hpccl.train.state import RunState

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS, SIZE, CLASSES, TASKS, PER_CLASS = 64, 32, 10, 2, 64
SAME = "lwf same"
DIAGONAL = ("curvature.kind=diagonal", "curvature.fisher=empirical", "prior.quadratic.anchor=each")

# Method by name: its configuration files and its settings, in addition to the common ones.
OURS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{
        name: ((f"method/{name}",), ())
        for name in (
            *("finetune", "ewc", "online_ewc", "mas", "mas_local", "si", "lwf", "lwf.mc", "er", "der", "der++"),
            *("replay", "fr", "fr+replay", "ewc+fr", "ewc+replay", "ewc+fr+replay", "kpriors", "icarl", "bic"),
        )
    },
    "ewc diagonal": (("method/ewc",), DIAGONAL),
    SAME: (("method/lwf", "preset/avalanche/lwf"), ()),
}
AGAIN = "again"
LOADING = " loading"
ASKING = (SAME, "lwf.mc", "icarl", "bic")  # evaluate the old network in every step
PAIRS = {
    "plain": "finetune",
    "avalanche ewc": "ewc diagonal",
    "avalanche mas": "mas",
    "avalanche si": "si",
    "avalanche lwf": SAME,
    "avalanche der": "der",
    "avalanche der++": "der++",
    "mammoth ewc": "ewc diagonal",
    "mammoth si": "si",
    "mammoth lwf": "lwf",
    "mammoth er": "er",
    "mammoth der": "der",
    "mammoth der++": "der++",
}
QUICK = ("finetune", "ewc diagonal", "mas", "si", "lwf", SAME, "er", "der", "der++")
HELD = ("finetune", "ewc diagonal", SAME, "plain", "avalanche ewc", "avalanche lwf")  # with memory under --quick


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="methods that have an opponent, few turns")
    parser.add_argument("--turns", type=int, help="that count (15; quick: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = QUICK if options.quick else tuple(OURS)
    turns = options.turns or (3 if options.quick else 15)
    with tempfile.TemporaryDirectory(prefix="hpccl-bench-") as folder:
        rates, cpu = timed(names, turns, Path(folder))
        with giving_back():
            peaks = {name: peak(name, Path(folder)) for name in (HELD if options.quick else (*names, *PAIRS))}
    report(rates, cpu, peaks, quick=options.quick, turns=turns)


# ---------------------------------------------------------------- ours


def configuration(name: str) -> RunConfig:
    """Return the configuration of a method, with strengths and learning rate so small that the weights hardly move."""
    files, settings = OURS[name]
    common = [
        "model={kind: cifarnet, dropout: false}",
        f"train.batch_size={ROWS}",
        "train.epochs=50",
        "train.head_epochs=0",
        "optim.name=adamw",
        "optim.lr=1e-6",
        "optim.schedule=constant",
        "engine.device=cpu",
        "log.reconstruction=0",
    ]
    config = load([CONFIGS / f"{file}.yaml" for file in files], [*common, *settings])
    more = []
    if config.memory.kept and config.memory.size:
        more += [f"memory.size={CLASSES * PER_CLASS // 2}", "memory.mix.kind=stratified"]
    elif config.memory.kept:
        more += [f"memory.total={CLASSES * PER_CLASS // 2}", "memory.mix.kind=stratified"]
    return load([CONFIGS / f"{file}.yaml" for file in files], [*common, *settings, *more])


def network() -> nn.Module:
    """Build the network, the same for all methods."""
    config = configuration("finetune").model
    return build_model(config, image_shape=(3, SIZE, SIZE), num_classes=TASKS * CLASSES, seed=0)


def ours(name: str, folder: Path, num_steps: int, *, loads: bool = False) -> Steps:
    """Return steps of the second task, which are taken one at a time."""
    comm, config = Comm.solo(), configuration(name)
    stream = random_stream(SIZE, tasks=TASKS, classes=CLASSES, train=PER_CLASS)
    engine = build_engine(config, network(), comm)
    world = make_world(config, comm, stream, folder / name.replace(" ", "_"))
    state = RunState(engine)
    engine.start(num_steps=1, task=0)
    consolidate(stream.tasks[0], state, world)
    steps = Steps(world, engine, stream.tasks[1], state.prior, count=1, loads=loads)
    engine.start(num_steps=num_steps, task=1, num_train=steps.plan.num_train)
    return steps


# ---------------------------------------------------------------- theirs


@dataclass
class Peer:
    """An opponent: a network, its state from the past, and its batches; a call takes a step and returns the rows."""

    name: str
    model: nn.Module = field(default_factory=network)

    def __post_init__(self) -> None:
        """Make batches, a buffer and, for LwF, an old network."""
        self.model = self.model.train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.step: Callable[[], None] = getattr(self, "_" + self.name.replace(" ", "_").replace("++", "pp"))
        images = RandomImages.of(SIZE).made.contiguous()
        half = self.name.split()[-1] in ("er", "der", "der++")
        self.rows = ROWS // 2 if half else ROWS
        self.x, self.y = images[: self.rows], torch.arange(self.rows) % CLASSES + CLASSES
        self.kept, self.labels = images[-256:], torch.arange(256) % CLASSES
        self.logits = torch.randn(256, TASKS * CLASSES)
        self.said = torch.randn(self.rows, CLASSES)
        if self.name == "avalanche lwf":
            self.old = copy.deepcopy(self.model)

    # Made by the first step of a method that uses it: others do not hold it.

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """Omega, by parameter."""
        return {name: 1e-6 * torch.rand_like(value) for name, value in self.model.named_parameters()}

    @cached_property
    def anchor(self) -> dict[str, Tensor]:
        """Where the last task ended."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    @cached_property
    def path(self) -> dict[str, Tensor]:
        """What a step did for the loss, summed."""
        return {name: torch.zeros_like(value).flatten() for name, value in self.model.named_parameters()}

    @cached_property
    def flat_importance(self) -> Tensor:
        """The same in one vector."""
        return 1e-6 * torch.rand_like(self._flat().detach())

    @cached_property
    def flat_anchor(self) -> Tensor:
        """The same in one vector."""
        return self._flat().detach()

    @cached_property
    def flat_path(self) -> Tensor:
        """The same in one vector."""
        return torch.zeros_like(self._flat().detach())

    def __call__(self) -> int:
        """Take one step; return the rows of our step, whatever this one passes through the network."""
        self.optimiser.zero_grad()
        self.step()
        return ROWS

    def _loss(self) -> Tensor:
        """Return the loss of new rows, among the new classes."""
        return functional.cross_entropy(self.model(self.x), self.y)

    def _end(self, loss: Tensor) -> None:
        loss.backward()
        self.optimiser.step()

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw as many rows from the buffer as there are new ones."""
        where = torch.randperm(len(self.kept))[: self.rows]
        return self.kept[where], self.labels[where], self.logits[where]

    def _flat(self) -> Tensor:
        return torch.cat([value.reshape(-1) for value in self.model.parameters()])

    def _flat_gradient(self) -> Tensor:
        return torch.cat([_gradient(value).reshape(-1) for value in self.model.parameters()])

    def _plain(self) -> None:
        self._end(self._loss())

    def _avalanche_ewc(self) -> None:
        loss = self._loss()
        penalty = torch.tensor(0.0)
        for name, value in self.model.named_parameters():
            own, anchor = self.importance[name].expand(value.shape), self.anchor[name].expand(value.shape)
            penalty = penalty + (own * (value - anchor).pow(2)).sum()
        self._end(loss + penalty)

    _avalanche_mas = _avalanche_ewc

    def _avalanche_si(self) -> None:
        before = {name: value.detach().flatten().clone() for name, value in self.model.named_parameters()}
        loss = self._loss()
        for name, value in self.model.named_parameters():
            distance = value.flatten() - self.anchor[name].flatten()
            loss = loss + torch.dot(self.importance[name].flatten(), distance**2) * 0.5
        self._end(loss)
        for name, value in self.model.named_parameters():
            self.path[name] += _gradient(value).flatten() * (value.detach().flatten() - before[name])

    def _avalanche_lwf(self) -> None:
        with torch.no_grad():
            old = self.old(self.x)[:, :CLASSES]
        out = self.model(self.x)
        asked, said = (out[:, :CLASSES] / 2).log_softmax(1), (old / 2).softmax(1)
        self._end(functional.cross_entropy(out, self.y) + functional.kl_div(asked, said, reduction="batchmean"))

    def _avalanche_der(self, beta: float = 0.0) -> None:
        x, y, logits = self._drawn()
        out = self.model(torch.cat((x, self.x)))
        loss = functional.cross_entropy(out[self.rows :], self.y)
        loss = loss + 0.1 * functional.mse_loss(out[: self.rows], logits)
        self._end(loss + beta * functional.cross_entropy(out[: self.rows], y))

    def _avalanche_derpp(self) -> None:
        self._avalanche_der(0.5)

    def _mammoth_ewc(self) -> None:
        loss = self._loss()
        with torch.no_grad():
            pull = 2 * self.flat_importance * (self._flat() - self.flat_anchor)
            first = 0
            for value in self.model.parameters():
                value.grad = pull[first : first + value.numel()].view(value.shape)
                first += value.numel()
        self._end(loss)

    def _mammoth_si(self) -> None:
        penalty = (self.flat_importance * (self._flat() - self.flat_anchor) ** 2).sum()
        (self._loss() + 0.1 * penalty).backward()
        nn.utils.clip_grad_value_(self.model.parameters(), 1)
        self.optimiser.step()
        self.flat_path += 1e-6 * self._flat_gradient() ** 2

    def _mammoth_lwf(self) -> None:
        out = self.model(self.x)
        asked, said = (_smooth(logits.softmax(1)) for logits in (out[:, :CLASSES], self.said))
        self._end(functional.cross_entropy(out, self.y) - 0.5 * (said * asked.log()).sum(1).mean())

    def _mammoth_er(self) -> None:
        x, y, _ = self._drawn()
        self._end(functional.cross_entropy(self.model(torch.cat((self.x, x))), torch.cat((self.y, y))))

    def _mammoth_der(self, beta: float | None = None) -> None:
        self._loss().backward()
        x, _, logits = self._drawn()
        (0.3 * functional.mse_loss(self.model(x), logits)).backward()
        if beta is not None:
            x, y, _ = self._drawn()
            (beta * functional.cross_entropy(self.model(x), y)).backward()
        self.optimiser.step()

    def _mammoth_derpp(self) -> None:
        self._mammoth_der(0.5)


def _gradient(value: Tensor) -> Tensor:
    assert value.grad is not None, "every weight is used"
    return value.grad


def _smooth(probabilities: Tensor) -> Tensor:
    root = probabilities ** (1 / 2)
    return root / root.sum(1, keepdim=True)


# ---------------------------------------------------------------- measures


Rates = dict[str, list[float]]
_LOADED = {peer + LOADING: own + LOADING for peer, own in _avalanche.PAIRS.items()}
_ALL_PAIRS = PAIRS | _avalanche.PAIRS | _LOADED


def timed(names: Sequence[str], turns: int, folder: Path) -> tuple[Rates, Rates]:
    """Return rows per second of every turn, ours and theirs: by the clock, and per second of processor time."""
    runs: dict[str, Callable[[], int]] = {name: ours(name, folder, turns + 1) for name in names}
    runs[AGAIN] = ours("finetune", folder, turns + 1)
    runs |= {peer: Peer(peer) for peer, own in PAIRS.items() if own in names}
    if _avalanche.installed():
        pairs = {name: own for name, own in _avalanche.PAIRS.items() if own in names}
        runs |= {own + LOADING: ours(own, folder, turns + 1, loads=True) for own in pairs.values()}
        runs |= {name: library(name, turns + 1) for name in pairs}
    for name, run in runs.items():
        if isinstance(run, Steps):
            rows = len(run.plan.batch(0))
            assert 0.9 * ROWS < rows <= ROWS, f"{name}: {rows} rows a step"  # held-out examples make steps smaller
    cpu: Rates = {name: [] for name in runs}

    def counted(name: str) -> int:
        start = time.process_time()
        rows = runs[name]()
        cpu[name].append(rows / (time.process_time() - start))
        return rows

    rates = interleaved({name: partial(counted, name) for name in runs}, turns)
    for name, run in runs.items():
        if isinstance(run, _avalanche.Strategy):  # its own clock excludes what is between two steps
            cpu[name + LOADING], rates[name + LOADING] = cpu[name], rates[name]
            cpu[name] = [ROWS / seconds for seconds in run.cpu]
            rates[name] = [ROWS / seconds for seconds in run.clock[1:]]
    return rates, {name: own[1:] for name, own in cpu.items()}  # the first turn warms up


def library(name: str, num_steps: int) -> _avalanche.Strategy:
    """Make a strategy of avalanche-lib with the same network and as many kept images."""
    images = RandomImages.of(SIZE, count=TASKS * CLASSES * PER_CLASS).made.contiguous()
    labels = torch.arange(len(images)) * TASKS // len(images) * CLASSES + torch.arange(len(images)) % CLASSES
    kept = CLASSES * PER_CLASS // 2
    return _avalanche.Strategy(name, network(), images, labels, num_steps=num_steps, rows=ROWS, memory=kept)


def peak(name: str, folder: Path) -> int:
    """Return the peak bytes of a method, measured in a process of its own."""
    spawn(hold, (name, folder))
    found: dict[str, int] = json.loads((folder / "found.json").read_text())
    return found["peak_bytes"]


def hold(rank: int, name: str, folder: Path) -> None:
    """Take three steps in a process of their own."""
    torch.set_num_threads(1)
    network().eval()(torch.randn(2, 3, SIZE, SIZE)).sum().backward()  # loads code
    gc.collect()
    before = memory_status()["VmRSS"]
    run: Callable[[], int] = Peer(name) if name in PAIRS else ours(name, folder / "held", 3)
    run()
    gc.collect()
    forget_peak()
    run()
    run()
    (folder / "found.json").write_text(json.dumps({"peak_bytes": memory_status()["VmHWM"] - before}))


def ratios(rates: Rates) -> tuple[dict[str, float], dict[str, float]]:
    """Return median ratios over turns of a step: over fine-tuning's, and of ours over each opponent's."""
    over = {name: median_ratio(rates, "finetune", name) for name in rates if name != "finetune"}
    return over, {peer: median_ratio(rates, peer, own) for peer, own in _ALL_PAIRS.items() if peer in rates}


def worst(peers: dict[str, float], pairs: Iterable[str]) -> str | None:
    """Return the pair in which ours is slowest relative to its opponent."""
    return max((name for name in pairs if name in peers), key=lambda name: peers[name], default=None)


def report(rates: Rates, cpu: Rates, peaks: dict[str, int], **details: Any) -> None:
    """Print one line per method and opponent, and the machine-readable one."""
    over, peers = ratios(cpu)
    clock_over, clock_peers = ratios(rates)
    for name, own in cpu.items():
        mine = _ALL_PAIRS.get(name)
        against = f"  {peers[name]:6.3f} ours ({mine}) over it" if name in peers else ""
        held = f" {peaks[name] / 2**20:7.1f} MiB" if name in peaks else ""
        print(f"{name:35} {1e3 * ROWS / median(own):8.2f} ms {over.get(name, 1.0):6.3f} x finetune{held}{against}")
    once = [name for name in over if name in OURS and name not in ASKING]
    worst_peer, worst_library, worst_loading = (worst(peers, pairs) for pairs in (PAIRS, _avalanche.PAIRS, _LOADED))
    worst_method = max(once, key=lambda name: over[name])
    assert worst_peer is not None, "plain is always there"
    print_result(
        "methods",
        {
            "worst_over_peer": peers[worst_peer],
            **({} if worst_library is None else {"worst_over_library": peers[worst_library]}),
            **({} if worst_loading is None else {"worst_over_library_loading": peers[worst_loading]}),
            "worst_over_finetune": over[worst_method],
            "again": over[AGAIN],
            "worst_over_peer_clock": clock_peers[worst_peer],
            "again_clock": clock_over[AGAIN],
        },
        worst={"peer": worst_peer, "library": worst_library, "loading": worst_loading, "method": worst_method},
        seconds={name: round(ROWS / median(own), 5) for name, own in rates.items()},
        processor_seconds={name: round(ROWS / median(own), 5) for name, own in cpu.items()},
        time_over_finetune={name: round(value, 4) for name, value in over.items()},
        peer_of=_ALL_PAIRS,
        time_over_peer={name: round(value, 4) for name, value in peers.items()},
        clock_over_peer={name: round(value, 4) for name, value in clock_peers.items()},
        peak_bytes=peaks,
        opponents="formulas of Avalanche 0.6.0 and Mammoth, written anew",
        avalanche_lib=_avalanche.version() if _avalanche.installed() else None,
        rows=ROWS,
        size=SIZE,
        **details,
    )


if __name__ == "__main__":
    main()
