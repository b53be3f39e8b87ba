"""Time and memory of selection: every selector on synthetic scores, logits and features.

    top-k                 scores of 1.28 M examples in 1000 classes, 128,000 of them kept, equally many per class
    sampled               the same, drawn with probabilities that grow with the score, with importance weights
    gini ... sensitivity  the scores themselves, from logits of 100 classes and inputs of 128 numbers, chunk by chunk
    herding, k-center     greedily by class, features of 128 numbers, 20 kept of every 1000
    reconstruction+fitted matching by class of vectors of 128 numbers (the projected gradients), 20 kept of every 1000

`reconstruction` with equal weights is herding of such vectors.

Every rank has its share of the examples and one thread; timing begins when inputs exist and ends when all ranks know
the choice. `numpy` is one process with all examples that does it the usual way: a sort of every class, the scores by
their formulas, herding with all distances at every pick, orthogonal matching with scipy's non-negative least squares at
every pick. Memory is the growth of a rank's resident memory during selection, without inputs.

    python -m benchmarks.selection            about five minutes on two cores
    python -m benchmarks.selection --quick    some seconds
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch import Tensor

from benchmarks._common import print_result, spawn
from hpccl.dist.comm import Comm
from hpccl.memory.by_class import by_class
from hpccl.memory.greedy import herding, k_center, matching
from hpccl.memory.score import TopLayer, error, gini, leverage, output_curvature, residual, sensitivity
from hpccl.memory.select import Candidates, choose, scored, uniform

Floats = npt.NDArray[np.floating]
Work = Callable[[], Any]

WIDTH, HEAD = 128, 100
SCORES = ("gini", "error", "residual", "leverage", "sensitivity")


@dataclass(frozen=True)
class Size:
    """The sizes. scores: candidates of the top-k; rows: examples with logits and features; 1000 per class."""

    scores: int
    rows: int

    @property
    def classes(self) -> int:
        """Number of classes of the rows."""
        return max(1, self.rows // 1000)


FULL, QUICK = Size(1_280_000, 1_000_000), Size(40_000, 8_000)


def labels_of(number: int, classes: int) -> npt.NDArray[np.int64]:
    """[number] labels, equally many of each class, shuffled."""
    return np.random.default_rng(1).permutation(np.arange(number) % classes)


def given_of(number: int, keep: int, classes: int) -> Candidates:
    """Return candidates that are numbered from 0."""
    return Candidates(np.arange(number), labels_of(number, classes), keep, balanced=True, words=(0, 101, 0))


def rows_of(share: range) -> Floats:
    """[share, WIDTH] features of some examples, the same on any rank."""
    blocks = [
        np.random.default_rng(block).standard_normal((1000, WIDTH), dtype=np.float32) + 0.5
        for block in range(share.start // 1000, -(-share.stop // 1000))
    ]
    first = share.start - share.start // 1000 * 1000
    return np.concatenate([*blocks, np.zeros((0, WIDTH), np.float32)])[first : first + len(share)]


def scores_of(share: range) -> npt.NDArray[np.float64]:
    """[share] scores > 0."""
    return np.random.default_rng(2).gamma(0.5, size=share.stop)[share.start :]


# ---------------------------------------------------------------- hpccl


def cases(comm: Comm, size: Size) -> Iterator[tuple[str, int, Work]]:
    """Yield (name, examples of all ranks, work to be timed) of every case; making the inputs is not timed."""
    scores = given_of(size.scores, size.scores // 10, 1000)
    share = comm.share(size.scores)
    mine, values = scores.samples[share.start : share.stop], scores_of(share)
    yield "uniform", size.scores, lambda: uniform(scores)
    yield "top-k", size.scores, lambda: scored(values, mine, scores, comm, sampled=False)
    yield "sampled", size.scores, lambda: scored(values, mine, scores, comm, sampled=True)
    chunk, repeats = chunk_of(), len(comm.share(size.rows)) // 1000
    for name in SCORES:
        yield name, size.rows, scoring(name, *chunk, repeats)
    rows = given_of(size.rows, 20 * size.classes, size.classes)
    share = comm.share(size.rows)
    mine, features = rows.samples[share.start : share.stop], torch.from_numpy(rows_of(share))
    picks = {
        "herding": lambda vectors, keep: (herding(vectors, keep), np.ones(keep)),
        "k_center": lambda vectors, keep: (k_center(vectors, keep), np.ones(keep)),
        "reconstruction+fitted": lambda vectors, keep: matching(vectors, keep, ridge=0.01),
    }
    valid = np.ones(len(mine), dtype=np.bool_)
    for name, pick in picks.items():
        yield (
            name,
            size.rows,
            partial(by_class, features, mine, valid, given=rows, comm=comm, pick=pick),
        )


def chunk_of() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [1000, HEAD], inputs [1000, WIDTH + 1] including the 1, labels [1000]."""
    random = np.random.default_rng(3)
    x = np.concatenate([random.standard_normal((1000, WIDTH)), np.ones((1000, 1))], axis=1).astype(np.float32)
    logits = torch.from_numpy(2 * random.standard_normal((1000, HEAD)).astype(np.float32))
    return logits, torch.from_numpy(x), torch.from_numpy(random.integers(0, HEAD, 1000))


def scoring(name: str, logits: Tensor, x: Tensor, labels: Tensor, repeats: int) -> Work:
    """Return the work of computing one score for `repeats` chunks."""
    layer = TopLayer.of(x.double().T @ x.double() / len(x), output_curvature(logits), prior_precision=1.0)
    once: dict[str, Work] = {
        "gini": lambda: gini(logits),
        "error": lambda: error(logits, labels),
        "residual": lambda: residual(logits, labels),
        "leverage": lambda: leverage(logits, x, layer),
        "sensitivity": lambda: sensitivity(logits, x, labels, layer),
    }
    return lambda: [once[name]() for _ in range(repeats)]


def rank(number: int, nproc: int, folder: str, size: Size, repetitions: int) -> None:
    """Measure every case on this rank and write what it found."""
    torch.set_num_threads(1)
    comm = Comm.solo()
    if nproc > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=nproc)
        comm = Comm(rank=number, size=nproc, device=torch.device("cpu"))
    found = {}
    for name, examples, work in cases(comm, size):
        comm.barrier()
        before = reset_peak()
        times = [timed(work, comm) for _ in range(repetitions)]
        found[name] = {"seconds": min(times), "peak_bytes": peak() - before, "examples": examples}
    Path(folder, f"{number}.json").write_text(json.dumps(found))
    if nproc > 1:
        dist.destroy_process_group()


def timed(work: Work, comm: Comm) -> float:
    """Return the seconds until the last rank is done."""
    comm.barrier()
    start = time.perf_counter()
    work()
    comm.barrier()
    return time.perf_counter() - start


def reset_peak() -> int:
    """Return the resident bytes, and reset the peak that `peak` returns."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """Return the peak resident bytes since `reset_peak`."""
    return status("VmHWM")


def status(key: str) -> int:
    """Return an entry of this process's status, in bytes; 0 where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


# ---------------------------------------------------------------- numpy alone


def references(size: Size) -> Iterator[tuple[str, int, Work]]:
    """Yield the same cases as `cases`, done the usual way in one process."""
    number = size.scores
    labels, values, samples = labels_of(number, 1000), scores_of(range(number)), np.arange(number)
    yield (
        "uniform",
        number,
        lambda: choose(labels, samples, keep=number // 10, balanced=True, words=(0, 101, 0)),
    )
    yield "top-k", number, lambda: sorted_by_class(values, labels, number // 10_000)
    yield (
        "sampled",
        number,
        lambda: sorted_by_class(np.log(np.random.default_rng(0).random(number)) / values, labels, number // 10_000),
    )
    logits, x, classes = (value.numpy().astype(np.float64) for value in chunk_of())
    for name in SCORES:
        yield name, size.rows, plain_scoring(name, logits, x, classes.astype(np.int64), size.rows // 1000)
    labels, features = labels_of(size.rows, size.classes), rows_of(range(size.rows))
    picks = {"herding": plain_herding, "k_center": plain_k_center, "reconstruction+fitted": plain_matching}
    for name, pick in picks.items():
        yield (
            name,
            size.rows,
            partial(of_classes, pick, features, labels, size.classes),
        )


def of_classes(pick: Callable[[Floats, int], Any], rows: Floats, labels: npt.NDArray[np.int64], classes: int) -> None:
    """Pick twenty examples of each class."""
    for each in range(classes):
        pick(rows[labels == each], 20)


def sorted_by_class(values: Floats, labels: npt.NDArray[np.int64], keep: int) -> list[npt.NDArray[np.int64]]:
    """Return the best of each class by sorting all."""
    order = np.lexsort((-values, labels))
    starts = np.searchsorted(labels[order], np.arange(labels.max() + 1))
    return [order[start : start + keep] for start in starts]


def plain_scoring(name: str, logits: Floats, x: Floats, labels: npt.NDArray[np.int64], repeats: int) -> Work:
    """Score by the formulas, with logit variances [n, K, K] from the inverted factors with the damping split."""
    head = np.arange(HEAD)

    def probabilities() -> Any:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    p = probabilities()
    curvature = np.diag(p.sum(axis=0)) - p.T @ p
    inverse_inputs = np.linalg.inv(x.T @ x / len(x) + 0.1 * np.eye(WIDTH + 1))
    inverse_outputs = np.linalg.inv(curvature + 0.1 * np.eye(HEAD))

    def once() -> Any:
        p = probabilities()
        e = p - (labels[:, None] == head)
        if name == "gini":
            return 1 - np.square(p).sum(axis=1)
        if name == "error":
            return -np.log(p[np.arange(len(p)), labels])
        if name == "residual":
            return np.square(e).sum(axis=1)
        v = np.einsum("nd,de,ne->n", x, inverse_inputs, x, optimize=True)[:, None] * np.diag(inverse_outputs)
        scale = p * (1 - p) * v
        return np.abs(scale * (1 if name == "leverage" else e)).sum(axis=1)

    return lambda: [once() for _ in range(repeats)]


def plain_herding(rows: Floats, keep: int) -> list[int]:
    """Do herding (Rebuffi et al. 2017, algorithm 4) with all distances at every pick."""
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean, total = x.mean(axis=0), np.zeros(rows.shape[1])
    chosen: list[int] = []
    for count in range(1, keep + 1):
        distance = np.linalg.norm(mean - (x + total) / count, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(np.argmin(distance)))
        total += x[chosen[-1]]
    return chosen


def plain_k_center(rows: Floats, keep: int) -> list[int]:
    """Do farthest-first k-center (Gonzalez 1985)."""
    chosen = [int(np.argmin(np.linalg.norm(rows - rows.mean(axis=0), axis=1)))]
    nearest = np.full(len(rows), np.inf)
    while len(chosen) < keep:
        nearest = np.minimum(nearest, np.linalg.norm(rows - rows[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(nearest)))
    return chosen


def plain_matching(rows: Floats, keep: int) -> tuple[list[int], Floats]:
    """Do orthogonal matching pursuit with weights >= 0, solved from scratch at every pick."""
    wide, target = rows.astype(np.float64), rows.sum(axis=0, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=1)
    chosen: list[int] = []
    weight = np.zeros(0)
    for _ in range(keep):
        gain = wide @ (target - weight @ wide[chosen]) / norms
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
        weight = nnls(wide[chosen].T, target)[0]
    return chosen, weight


def alone(_: int, folder: str, size: Size, repetitions: int) -> None:
    """Measure the references in one process."""
    torch.set_num_threads(1)
    found = {}
    for name, examples, work in references(size):
        before = reset_peak()
        times = [timed(work, Comm.solo()) for _ in range(repetitions)]
        found[name] = {"seconds": min(times), "peak_bytes": peak() - before, "examples": examples}
    Path(folder, "0.json").write_text(json.dumps(found))


# ---------------------------------------------------------------- all of it


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few examples, 1 and 2 ranks")
    parser.add_argument("--nproc", type=int, nargs="+", default=None, help="numbers of ranks (default: 1 2 4)")
    parser.add_argument("--repetitions", type=int, default=None, help="the best of so many counts (default: 3)")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    repetitions = options.repetitions or (1 if options.quick else 3)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found: dict[str, Any] = {}
    for nproc in options.nproc or ((1, 2) if options.quick else (1, 2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            spawn(rank, (nproc, folder, size, repetitions), nproc)
            parts = [json.loads(Path(folder, f"{number}.json").read_text()) for number in range(nproc)]
        found[str(nproc)] = {
            name: {
                "seconds": max(part[name]["seconds"] for part in parts),
                "peak_bytes": max(part[name]["peak_bytes"] for part in parts),
                "examples": parts[0][name]["examples"],
            }
            for name in parts[0]
        }
        print(f"{nproc} ranks done", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(alone, (folder, size, repetitions))
        found["numpy"] = json.loads(Path(folder, "0.json").read_text())
    count, most = "2" if "2" in found else "1", max((key for key in found if key != "numpy"), key=int)
    several = found[count]
    headline = {
        "topk_seconds": several["top-k"]["seconds"],
        f"topk_on_{count}_over_numpy_on_1": found["numpy"]["top-k"]["seconds"] / several["top-k"]["seconds"],
        "topk_peak_mib": found[most]["top-k"]["peak_bytes"] / 2**20,
        **{
            f"{name}_on_{count}_over_numpy_on_1": found["numpy"][name]["seconds"] / several[name]["seconds"]
            for name in ("herding", "k_center", "reconstruction+fitted")
        },
    }
    print_result("selection", headline, cases=found, size=vars(size), width=WIDTH, head=HEAD)


if __name__ == "__main__":
    main()
