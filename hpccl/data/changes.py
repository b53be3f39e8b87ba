"""How a task changes all of its images, where tasks are views of one data set: permuted pixels, or a rotation.

A change is a function of (seed, task) alone, applied after augmentation: crops and mirrors act on the image as stored.
Task 0 changes nothing.

Sources: Kirkpatrick et al. 2017 (EWC) and Goodfellow et al. 2013 for permuted pixels, Lopez-Paz and Ranzato 2017 (GEM)
for angles in [0, 180).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpccl.data.order import mix, permutation
from hpccl.data.views import to_array, to_picture

__all__ = ["Changes", "Permuted", "Rotated", "angles"]

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

# The purposes of hashes, other than those in hpccl.data.order and layout.
_PIXELS, _ANGLE = 411, 412


@dataclass(frozen=True)
class Permuted:
    """A permutation of the pixels, the same for all channels."""

    seed: int

    def __call__(self, images: Pixels, task: int) -> Pixels:
        """Permute images [n, h, w, channels]."""
        num, height, width, channels = images.shape
        order = permutation(height * width, self.seed, _PIXELS, task)
        return images.reshape(num, height * width, channels)[:, order].reshape(images.shape)


@dataclass(frozen=True)
class Rotated:
    """A counterclockwise rotation around the centre; the uncovered corners are black.

    angles: [T] degrees by task
    """

    angles: tuple[float, ...]

    def __call__(self, images: Pixels, task: int) -> Pixels:
        """Rotate images [n, h, w, channels]."""
        turned = [
            to_array(to_picture(image).rotate(self.angles[task], resample=Image.Resampling.BILINEAR))
            for image in images
        ]
        return np.stack(turned)


@dataclass(frozen=True)
class Changes:
    """Applies the changes of several tasks to the images of one batch."""

    kind: Permuted | Rotated

    def __call__(self, images: Pixels, tasks: Ints) -> Pixels:
        """Change images [n, h, w, channels] according to their task [n]; a copy if any of them changes."""
        changed = np.flatnonzero(tasks != 0)
        if len(changed) == 0:
            return images
        found = images.copy()
        for task in np.unique(tasks[changed]).tolist():
            mine = np.flatnonzero(tasks == task)
            found[mine] = self.kind(images[mine], task)
        return found


def angles(tasks: int, *, degrees: float, drawn: bool, seed: int) -> tuple[float, ...]:
    """[T] angle of each task: 0 for the first, others drawn uniformly from [0, degrees), or degrees * task / tasks."""
    if not drawn:
        return tuple(degrees * task / tasks for task in range(tasks))
    share = mix(seed, _ANGLE, np.arange(tasks)) / np.float64(2**64)
    return (0.0, *(degrees * share[1:]).tolist())
