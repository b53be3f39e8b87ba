"""The results of an adaptation, as adaptation.json and adaptation.md in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpccl.folder import replacing

__all__ = ["Adaptation", "Cost", "Network", "markdown", "write_adaptation"]


@dataclass(frozen=True)
class Network:
    """A network's results on test images; the last three compare it with the reference, None without one.

    accuracy: on all test images, a share
    accuracy_kept, accuracy_removed: on the classes that stay and on the removed ones; None if no class was removed
    agreement: share of test images for which both networks predict the same class
    total_variation: mean over test images of 1/2 sum_c |p_c - reference's p_c|
    distance: Euclidean distance of the learned weights; None between different kinds of networks
    """

    accuracy: float
    accuracy_kept: float | None
    accuracy_removed: float | None
    agreement: float | None
    total_variation: float | None
    distance: float | None


@dataclass(frozen=True)
class Cost:
    """The cost of training. images: passed forward and back, or labelled; seconds: the time this took."""

    images: int
    seconds: float


@dataclass(frozen=True)
class Adaptation:
    """An adaptation's results. start: the network before; adapted: after it; retrained: the reference, or None."""

    kind: str
    run: str
    source: str
    reference: str | None
    start: Network
    adapted: Network
    retrained: Network | None
    cost: Cost
    reference_cost: Cost | None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, with the cost as shares of the reference's and the difference in accuracy."""
        found = asdict(self)
        if self.retrained is not None and self.reference_cost is not None:
            found["accuracy_difference"] = self.adapted.accuracy - self.retrained.accuracy
            found["share_of_images"] = _share(self.cost.images, self.reference_cost.images)
            found["share_of_seconds"] = _share(self.cost.seconds, self.reference_cost.seconds)
        return found


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def write_adaptation(found: Adaptation, folder: Path) -> Path:
    """Write both files; return the path of adaptation.md.

    Raises:
        FolderError: they cannot be written.
    """
    for suffix, text in (("json", json.dumps(found.as_dict(), indent=2) + "\n"), ("md", markdown(found) + "\n")):
        with replacing(folder / f"adaptation.{suffix}") as path:
            path.write_text(text, encoding="utf-8")
    return folder / "adaptation.md"


_ROWS = (
    ("accuracy", "accuracy, %", 100),
    ("accuracy_kept", "of the classes that stay, %", 100),
    ("accuracy_removed", "of the removed classes, %", 100),
    ("agreement", "agrees with retraining, %", 100),
    ("total_variation", "probability that differs from retraining's, %", 100),
    ("distance", "distance of weights from retraining's", 1),
)


def markdown(found: Adaptation) -> str:
    """Return the results as a table, followed by the cost."""
    networks = [("before", found.start), ("adapted", found.adapted)]
    networks += [("retrained", found.retrained)] if found.retrained is not None else []
    lines = [f"# {found.source}: {found.kind}", "", "| | " + " | ".join(name for name, _ in networks) + " |"]
    lines.append("|---" * (len(networks) + 1) + "|")
    for key, title, scale in _ROWS:
        values = [getattr(network, key) for _, network in networks]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{scale * value:.2f}" for value in values]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", f"Adapting took {found.cost.images:,} images and {found.cost.seconds:.1f} s."]
    if found.reference_cost is not None:
        whole = found.reference_cost
        images, seconds = _share(found.cost.images, whole.images), _share(found.cost.seconds, whole.seconds)
        known = [(share, what) for share, what in ((images, "images"), (seconds, "time")) if share is not None]
        shares = ", ".join(f"{100 * share:.1f} % of the {what}" for share, what in known)
        lines.append(f"Retraining took {whole.images:,} images and {whole.seconds:.1f} s: adapting is {shares}.")
    return "\n".join(lines)
