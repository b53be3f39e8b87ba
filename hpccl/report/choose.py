"""Choice of the best settings on a validation split, among finished runs, written as configuration files.

Runs of a method belong to one candidate if they differ only in seed and size of the memory. The best candidate has the
highest mean accuracy after the last task over all its sizes and seeds: with train.head=own the average over tasks, each
among its own classes; with train.head=seen that of all classes on all their images. Of ties, the one whose runs were
given first is taken. Test images are never used: runs without data.validation are refused, and so are runs of a method
that were not tested on the same images and tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from hpccl.config.differences import Flat, flat
from hpccl.errors import ConfigError
from hpccl.report.archive import read_runs
from hpccl.report.compare import IGNORED, MEMORY_SIZES
from hpccl.report.summary import RunReport
from hpccl.report.write import write_text

__all__ = ["Candidate", "Choice", "choose", "choose_runs", "write_choices"]

_SHOWN = 5  # settings that an error lists


@dataclass(frozen=True)
class Candidate:
    """One choice of a method's settings.

    settings: by dotted key, those in which the method's candidates differ; accuracies: one per run, shares; runs: names
    """

    settings: Flat
    accuracies: tuple[float, ...]
    runs: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The mean over its runs."""
        return float(np.mean(self.accuracies))


@dataclass(frozen=True)
class Choice:
    """The candidates of a method, the best one first.

    validation: share of the training images that they were compared on; figure: name of the accuracy they were
    compared by
    """

    method: str
    candidates: tuple[Candidate, ...]
    validation: float
    figure: str = "Average accuracy"

    @property
    def best(self) -> Candidate:
        """The chosen candidate."""
        return self.candidates[0]

    @property
    def lead(self) -> float | None:
        """The accuracy by which it is ahead of the next, a share; None without another candidate."""
        return self.best.accuracy - self.candidates[1].accuracy if len(self.candidates) > 1 else None

    @property
    def lead_error(self) -> float | None:
        """The standard error of the lead, from the differences at each size and seed; None with fewer than two."""
        if len(self.candidates) < 2 or len(self.best.accuracies) < 2:
            return None
        differences = np.subtract(self.best.accuracies, self.candidates[1].accuracies)
        return float(differences.std(ddof=1) / len(differences) ** 0.5)


def choose_runs(paths: Sequence[Path]) -> list[Choice]:
    """Choose for each method that has runs in `paths` (folders and archives), in order of appearance.

    Raises:
        FolderError: a path is neither.
        ConfigError: a run is not finished or was measured on test images, or candidates do not have the same sizes and
            seeds, or not the same stream and data.validation.
    """
    recorded = read_runs(paths)
    return choose([flat(run.config.identity()) for run in recorded], [run.report() for run in recorded])


def choose(identities: Sequence[Flat], runs: Sequence[RunReport]) -> list[Choice]:
    """Do the same as `choose_runs`, from the settings and reports of runs."""
    if not runs:
        raise ConfigError("there is nothing to choose from: give the folders of finished runs with data.validation")
    for run in runs:
        _check(run)
    found = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [(one, run) for one, run in zip(identities, runs, strict=True) if run.method == method]
        figure = "Class-incremental accuracy" if _all_compete(mine[0][0]) else "Average accuracy"
        found.append(Choice(method, _candidates(method, mine), float(mine[0][1].validation or 0.0), figure))
    return found


def write_choices(choices: Iterable[Choice], out: Path) -> list[Path]:
    """Write one file per method, METHOD.yaml in `out`, with the chosen settings; return the paths.

    Raises:
        FolderError: one cannot be written.
    """
    paths = []
    for choice in choices:
        path = out / f"{choice.method}.yaml"
        write_text(path, _render(choice))
        paths.append(path)
    return paths


def _all_compete(identity: Flat) -> bool:
    """Whether all classes seen compete in a run."""
    return bool(identity.get("train.head") == "seen")


def _accuracy(identity: Flat, run: RunReport) -> float:
    """Return the accuracy by which a run is compared, a share."""
    found = run.final_union_accuracy if _all_compete(identity) else run.average_accuracy
    if found is None:
        raise ConfigError(f"run '{run.name}' has no accuracy of all classes after the last task; leave it out")
    return found


def _check(run: RunReport) -> None:
    if run.validation is None:
        raise ConfigError(
            f"run '{run.name}' was measured on test images; settings are chosen on a validation split: "
            "train it with data.validation=0.1"
        )
    if run.status != "done" or run.average_accuracy is None:
        raise ConfigError(f"run '{run.name}' is not finished ({run.status}); finish it, or leave it out")
    if not run.complete:
        raise ConfigError(f"run '{run.name}': {run.message}; leave it out")


def _candidates(method: str, mine: Sequence[tuple[Flat, RunReport]]) -> tuple[Candidate, ...]:
    """Return the candidates of one method, the best first."""
    _refuse_other_tests(method, mine)
    groups: dict[str, list[tuple[Flat, RunReport]]] = {}
    for identity, run in mine:
        groups.setdefault(_text({k: v for k, v in identity.items() if k not in (*IGNORED, *MEMORY_SIZES)}), []).append(
            (identity, run)
        )
    places = [sorted(_place(*each) for each in group) for group in groups.values()]
    if any(place != places[0] for place in places):
        raise ConfigError(
            f"candidates of '{method}' were not tried with the same sizes of memory and seeds, once each: "
            f"{' against '.join(dict.fromkeys(map(str, places)))} (size, seed); finish all of them, or leave some out"
        )
    firsts = [group[0][0] for group in groups.values()]
    keys = [key for key in dict.fromkeys(key for one in firsts for key in one) if _differs(key, firsts)]
    found = []
    for group in groups.values():
        ordered = sorted(group, key=lambda each: _place(*each))
        settings = {key: group[0][0][key] for key in keys if key in group[0][0]}
        accuracies = tuple(_accuracy(*each) for each in ordered)
        found.append(Candidate(settings, accuracies, tuple(run.name for _, run in ordered)))
    return tuple(sorted(found, key=lambda candidate: -candidate.accuracy))  # stable: of ties, the first given


def _refuse_other_tests(method: str, mine: Sequence[tuple[Flat, RunReport]]) -> None:
    """Raise if runs were tested on different tasks or images, which makes accuracies incomparable."""
    first, run = mine[0][0], mine[0][1]
    for other, its_run in mine[1:]:
        keys = [key for key in dict.fromkeys([*first, *other]) if _is_of_test(key) and _differs(key, [first, other])]
        if not keys:
            continue
        told = [
            f"{name} is {was} in run '{run.name}' and {now} in '{its_run.name}'"
            for key in keys
            for name, was, now in _unlike(key, first.get(key, "absent"), other.get(key, "absent"))
        ]
        more = f"; and {len(told) - _SHOWN} more settings" if len(told) > _SHOWN else ""
        raise ConfigError(
            f"runs of '{method}' were not tested on the same images and tasks, so that their accuracies cannot be "
            f"compared: {'; '.join(told[:_SHOWN])}{more}. Give runs to `hpccl choose` that have the same "
            "data.validation, train.head and stream"
        )


def _is_of_test(key: str) -> bool:
    return key in ("data.validation", "train.head") or key.startswith("stream.")


def _unlike(name: str, first: Any, second: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, other value) of all differences within two values of a setting, such as parts of a stream."""
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _unlike(f"{name}[{number}]", one, other)
    elif isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            yield from _unlike(f"{name}.{key}", first.get(key, "absent"), second.get(key, "absent"))
    elif _text(first) != _text(second):
        yield name, _text(first).replace('"absent"', "absent"), _text(second).replace('"absent"', "absent")


def _place(identity: Flat, run: RunReport) -> tuple[str, int]:
    return " ".join(str(identity[key]) for key in MEMORY_SIZES if identity.get(key)), run.seed


def _differs(key: str, identities: Sequence[Flat]) -> bool:
    if key in (*IGNORED, *MEMORY_SIZES):
        return False
    return len({_text(one.get(key, "absent")) for one in identities}) > 1


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _render(choice: Choice) -> str:
    best, lead = choice.best, choice.lead
    ahead = "the only candidate"
    if lead is not None:
        error = f" ± {100 * choice.lead_error:.2f}" if choice.lead_error is not None else ""
        ahead = f"{100 * lead:.2f}{error} points ahead of the next of {len(choice.candidates)}"
    runs = f"{len(best.runs)} run{'s' * (len(best.runs) > 1)}"
    lines = [
        f"# {choice.method}: chosen by `hpccl choose` on {100 * choice.validation:g} % of the training images.",
        f"# {choice.figure} {100 * best.accuracy:.1f} % over {runs}, {ahead}.",
    ]
    nested: dict[str, Any] = {}
    for key, value in best.settings.items():
        _put(nested, key.split("."), value)
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = None
    if nested:
        yaml.dump(nested, text)
    return "\n".join(lines) + "\n" + text.getvalue()


def _put(nested: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        nested = nested.setdefault(key, {})
    nested[keys[-1]] = value if not isinstance(value, Mapping) else dict(value)
