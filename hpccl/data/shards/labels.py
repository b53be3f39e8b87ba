"""Classes of images that are not in class folders, such as ILSVRC's validation images, from a file of the user's.

name class [...]        a line per image; separated by blanks or commas, such as Kaggle's LOC_val_solution.csv
number                  a line per image, in the order of the images' names: ILSVRC's ground truth. Numbers count
                        from 1 in a list of classes, which is not in alphabetical order and must be given
ILSVRC2012_devkit*.tar  the development kit, which contains both
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hpccl.errors import ConfigError, DataError

__all__ = ["Labels", "read_labels"]

_TRUTH = re.compile(r"ILSVRC\d*_validation_ground_truth\.txt$")
_META = re.compile(r"meta\.mat$")
_HEADER = re.compile(r"imageid\b", re.IGNORECASE)
_SAFE = re.compile(r"[^/\x00-\x20]+")


@dataclass(frozen=True)
class Labels:
    """Labels of images, either by name or by order.

    file: the file that they are from; by_name: class by the image's name without folders and suffix, or None; in_order:
    else the class of each image, in the order of their names
    """

    file: Path
    by_name: Mapping[str, str] | None
    in_order: Sequence[str]

    def of(self, names: Sequence[str]) -> list[str]:
        """Return the class of every image.

        Raises:
            DataError: an image has no label, or a label no image.
        """
        stems = [PurePosixPath(name).stem for name in names]
        expected = len(self.in_order if self.by_name is None else self.by_name)
        if expected != len(names):
            raise DataError(
                f"'{self.file}' has labels of {expected} images, but the source has {len(names)}: give one "
                "label for each of these images"
            )
        if self.by_name is None:
            place = {stem: number for number, stem in enumerate(_ordered(stems, self.file))}
            return [self.in_order[place[stem]] for stem in stems]
        missing = [stem for stem in stems if stem not in self.by_name]
        if missing:
            raise DataError(f"'{self.file}' has no label for '{missing[0]}' ({len(missing)} images in all have none)")
        unused = self.by_name.keys() - set(stems)
        if unused:  # although there are as many labels as images
            twice = next(stem for stem, times in Counter(stems).items() if times > 1)
            raise DataError(
                f"'{self.file}' has one label for '{twice}', the name of several images, and one for "
                f"'{min(unused)}', the name of none: give images different names (folders and suffixes do not count)"
            )
        return [self.by_name[stem] for stem in stems]


def _ordered(stems: Sequence[str], file: Path) -> list[str]:
    """Sort by name, if that order is unambiguous.

    Raises:
        DataError: two images have one name, or the numbers in their names have several lengths and another order.
    """
    found = sorted(stems)
    twice = next((stem for stem, following in itertools.pairwise(found) if stem == following), None)
    if twice is not None:
        raise DataError(
            f"'{file}' has a label for each image in the order of their names, but several are named '{twice}': put "
            "all images into one folder, under different names"
        )
    counted = sorted(found, key=_counted)
    if found != counted:
        one, other = next(pair for pair in zip(found, counted, strict=True) if pair[0] != pair[1])
        raise DataError(
            f"'{file}' has a label for each image in the order of their names, but these have numbers of different "
            f"lengths: is '{one}' before '{other}'? name them with zeros in front, or give labels with names"
        )
    return found


def _counted(stem: str) -> list[tuple[str, int]]:
    """Return a sort key that orders names with numbers by the numbers."""
    parts = re.split(r"([0-9]+)", stem)
    return [(text, int(digits or 0)) for text, digits in itertools.zip_longest(parts[::2], parts[1::2])]


def read_labels(path: Path, synsets: Path | None = None) -> Labels:
    """Read one of the three kinds of files.

    Args:
        path: the file of labels.
        synsets: a file with one class per line, that of number 1 first; for labels that are numbers.

    Raises:
        ConfigError: `synsets` is needed, or is not.
        DataError: a file cannot be read, or is ambiguous.
    """
    try:
        if tarfile.is_tarfile(path):
            return _numbered(path, *_from_devkit(path))
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, tarfile.TarError, EOFError) as error:
        raise DataError(f"labels '{path}' cannot be read ({error}): give a text file or ILSVRC's devkit") from error
    lines = [line for line in lines if line and not _HEADER.match(line)]
    if not lines:
        raise DataError(f"labels '{path}' are empty")
    if all(line.isdecimal() for line in lines):
        if synsets is None:
            raise ConfigError(
                f"labels '{path}' are numbers, whose order of classes is not the alphabetical one: give the list too "
                "(--synsets FILE, one class per line, number 1 first), or ILSVRC's devkit as the labels"
            )
        return _numbered(path, [int(line) for line in lines], _listed(synsets))
    if synsets is not None:
        raise ConfigError(f"labels '{path}' name their classes: leave --synsets out")
    return Labels(path, _by_name(path, lines), ())


def _by_name(path: Path, lines: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = re.split(r"[\s,]+", line)
        if len(words) < 2 or not _SAFE.fullmatch(words[1]):
            raise DataError(f"line {number} of '{path}' is {line[:60]!r}; it must be an image's name and its class")
        stem = PurePosixPath(words[0]).stem
        if words[1].isdecimal():
            raise DataError(
                f"line {number} of '{path}' gives the number {words[1]} for '{stem}', not a class: write the class's "
                "name (that of its folder in the training data, such as n01440764)"
            )
        if found.setdefault(stem, words[1]) != words[1]:
            raise DataError(f"'{path}' gives '{stem}' two classes: {found[stem]} and {words[1]}")
    return found


def _numbered(path: Path, numbers: Sequence[int], names: Sequence[str]) -> Labels:
    wrong = [number for number in numbers if not 1 <= number <= len(names)]
    if wrong:
        raise DataError(f"labels '{path}' have the number {wrong[0]}, but there are classes 1 to {len(names)}")
    return Labels(path, None, [names[number - 1] for number in numbers])


def _listed(path: Path) -> list[str]:
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list of classes '{path}' cannot be read ({error})") from error
    if len(set(names)) != len(names) or not all(map(_SAFE.fullmatch, names)):
        raise DataError(f"list of classes '{path}' must have one class per line, each once")
    return names


def _from_devkit(path: Path) -> tuple[list[int], list[str]]:
    """Return the class numbers of the validation images, and the classes by number."""
    from scipy.io import loadmat

    with tarfile.open(path) as archive:
        found = {member.name: member for member in archive.getmembers() if member.isreg()}
        files = {}
        for kind, pattern in (("truth", _TRUTH), ("meta", _META)):
            names = [name for name in found if pattern.search(name)]
            if len(names) != 1:
                raise DataError(f"'{path}' is not ILSVRC's devkit: it has {len(names)} files {pattern.pattern}")
            content = archive.extractfile(found[names[0]])
            assert content is not None, "a regular file"
            files[kind] = content.read()
    try:
        synsets = loadmat(io.BytesIO(files["meta"]), squeeze_me=True)["synsets"]
        # Inner nodes of WordNet have children; the classes have none and the smallest numbers.
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        names = [leaves[number] for number in range(1, len(leaves) + 1)]
        return [int(line) for line in files["truth"].split()], names
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"the devkit '{path}' has an unusual form ({error!r}): give the labels as text") from error
