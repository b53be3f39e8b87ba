"""ILSVRC as it is published: a tar of class tars, a flat tar of validation images, labels in one of several files."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from hpccl.data.shards.build import build
from hpccl.data.shards.checksum import parse_checksum
from hpccl.data.shards.labels import read_labels
from hpccl.data.shards.reader import ShardSet
from hpccl.errors import ConfigError, DataError
from tests.unit.data.tiny_images import hash_of, image_bytes, per_class_tars, pixels, tar_bytes

WNIDS = ("n01440764", "n01443537", "n02119789", "n03995372")
NUMBERED = ("n02119789", "n03995372", "n01440764", "n01443537")  # the devkit's order is not the alphabet's
NAMES = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 13)]
TRUTH = [random.Random(7).randint(1, 4) if number > 4 else number for number in range(1, 13)]
CLASS = {name: NUMBERED[number - 1] for name, number in zip(NAMES, TRUTH, strict=True)}
VALIDATION = {f"{name}.JPEG": image_bytes(pixels(hash_of(name), 20, 24)) for name in NAMES}


@pytest.fixture
def tars(tmp_path: Path) -> tuple[Path, Path]:
    """The training tar of tars and the flat validation tar."""
    images = {f"{name}/{name}_{n}.JPEG": image_bytes(pixels(n, 20, 30)) for name in WNIDS for n in range(3)}
    train, validation = tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "ILSVRC2012_img_val.tar"
    train.write_bytes(tar_bytes(per_class_tars(images)))
    shuffled = list(VALIDATION)
    random.Random(0).shuffle(shuffled)
    validation.write_bytes(tar_bytes({name: VALIDATION[name] for name in shuffled}))
    return train, validation


def text(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def devkit(path: Path) -> Path:
    """With an inner node of WordNet, as the real one."""
    rows = [(number, name, 0) for number, name in enumerate(NUMBERED, 1)] + [(5, "n00001740", 4)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind)[:, None]})
    folder = "ILSVRC2012_devkit_t12/data"
    content = {
        f"{folder}/meta.mat": meta.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode(),
    }
    with tarfile.open(path, "w:gz") as archive, tarfile.open(fileobj=io.BytesIO(tar_bytes(content))) as plain:
        for member in plain:
            archive.addfile(member, plain.extractfile(member))
    return path


def written(kind: str, folder: Path) -> tuple[Path, Path | None]:
    """A file of labels and, for numbers, the list of classes."""
    synsets = text(folder / "synsets.txt", [f"{name} some words" for name in NUMBERED])
    match kind:
        case "names":
            return text(folder / "labels", [f"{name}.JPEG {CLASS[name]}" for name in reversed(NAMES)]), None
        case "kaggle":
            lines = [f"{name},{CLASS[name]} 85 1 499 272 " for name in NAMES]
            return text(folder / "LOC_val_solution.csv", ["ImageId,PredictionString", *lines]), None
        case "numbers":
            return text(folder / "truth.txt", list(map(str, TRUTH))), synsets
        case _:
            return devkit(folder / "devkit.tar.gz"), None


@pytest.mark.parametrize("kind", ["names", "kaggle", "numbers", "devkit"])
def test_the_published_files_become_two_splits_of_the_same_classes(
    tars: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    train, validation = tars
    out = tmp_path / "shards"
    build(train, out, split="train")
    labels = read_labels(*written(kind, tmp_path))
    checksum = f"md5:{hashlib.md5(validation.read_bytes()).hexdigest()}"
    build(validation, out, split="test", labels=labels, checksum=checksum)
    shards = ShardSet.open(out, "test")
    assert shards.classes == ShardSet.open(out, "train").classes == WNIDS
    assert len(shards) == len(NAMES)
    for sample in range(len(shards)):
        name = shards.name(sample).split("/")[1]
        assert shards.classes[shards.labels[sample]] == CLASS[name], name
        assert shards.read(sample) == VALIDATION[f"{name}.JPEG"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.jpg", "b/1.jpg", "b/2.jpg"], "several are named '1': put all images into one folder"),
        (["1.jpg", "2.jpg", "10.jpg"], "numbers of different lengths: is '10' before '2'[?] name them with zeros in"),
        (["val_1.jpg", "val_10.jpg", "val_2.jpg"], "numbers of different lengths: is 'val_10' before 'val_2'"),
    ],
)
def test_labels_by_the_order_of_names_need_an_order(tmp_path: Path, names: list[str], message: str) -> None:
    truth, synsets = text(tmp_path / "truth.txt", ["1", "2", "3"]), text(tmp_path / "synsets.txt", list(NUMBERED))
    labels = read_labels(truth, synsets)
    with pytest.raises(DataError, match=message):
        labels.of(names)
    assert labels.of(["03.jpg", "x/01.jpg", "02.jpg"]) == [NUMBERED[2], NUMBERED[0], NUMBERED[1]]


def test_a_flat_tar_needs_labels(tars: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no class.*--labels"):
        build(tars[1], tmp_path / "shards", split="test")


def test_labels_of_unknown_classes_are_refused(tars: tuple[Path, Path], tmp_path: Path) -> None:
    build(tars[0], tmp_path / "shards", split="train")
    labels = read_labels(text(tmp_path / "labels", [f"{name} n{number}" for number, name in enumerate(NAMES)]))
    with pytest.raises(DataError, match="gives the class 'n0', which split 'train'"):
        build(tars[1], tmp_path / "shards", split="test", labels=labels)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1", "2"], "are numbers, whose order of classes is not the alphabetical one"),
        (["a 65", "b 970"], "gives the number 65 for 'a', not a class"),
        (["a n01", "a n02"], "gives 'a' two classes: n01 and n02"),
        (["a n01", "b"], "line 2 of .* is 'b'"),
        (["a ../../x"], "line 1 of"),
        ([], "are empty"),
    ],
)
def test_labels_that_are_not_certain(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises((DataError, ConfigError), match=words):
        read_labels(text(tmp_path / "labels", lines))


@pytest.mark.parametrize("names", [("x/1.png", "y/1.png"), ("x/1.png", "x/1.jpg")])
def test_a_label_is_not_given_to_two_images(tmp_path: Path, names: tuple[str, str]) -> None:
    source = tmp_path / "set.tar"
    source.write_bytes(tar_bytes({name: image_bytes(pixels(0, 8, 8), "png") for name in names}))
    labels = read_labels(text(tmp_path / "labels", ["1 cat", "2 dog"]))
    with pytest.raises(DataError, match=r"one label for '1', the name of several images, and one for '2'"):
        build(source, tmp_path / "shards", split="test", labels=labels)


def test_labels_of_other_images(tars: tuple[Path, Path], tmp_path: Path) -> None:
    few = read_labels(text(tmp_path / "few", [f"{name} n01440764" for name in NAMES[1:]]))
    with pytest.raises(DataError, match="has labels of 11 images, but the source has 12"):
        build(tars[1], tmp_path / "shards", split="test", labels=few)
    other = read_labels(text(tmp_path / "other", [f"{name} n01440764" for name in [*NAMES[1:], "x"]]))
    with pytest.raises(DataError, match=r"has no label for 'ILSVRC2012_val_00000001' \(1 images"):
        build(tars[1], tmp_path / "shards", split="test", labels=other)
    with pytest.raises(DataError, match="have the number 4, but there are classes 1 to 3"):
        read_labels(written("numbers", tmp_path)[0], text(tmp_path / "short", list(NUMBERED[:3])))


def test_a_damaged_source_is_refused_before_anything_is_written(tars: tuple[Path, Path], tmp_path: Path) -> None:
    train, out = tars[0], tmp_path / "shards"
    good = hashlib.sha256(train.read_bytes()).hexdigest()
    with train.open("r+b") as file:
        file.seek(1000)
        file.write(b"?")
    with pytest.raises(DataError, match=f"not {good}: it is damaged"):
        build(train, out, split="train", checksum=f"sha256:{good}")
    assert not out.exists()


def test_a_source_that_is_not_there_or_has_the_shards_in_it(tmp_path: Path) -> None:
    for checksum in (None, "md5:" + "0" * 32):
        with pytest.raises(DataError, match=r"nowhere.tar' (does not exist|cannot be read: No such file)"):
            build(tmp_path / "nowhere.tar", tmp_path / "shards", checksum=checksum)
    (tmp_path / "images").mkdir()
    for out in (tmp_path / "images", tmp_path / "images" / "shards"):
        with pytest.raises(ConfigError, match="would be taken for images: give a folder outside it"):
            build(tmp_path / "images", out)


def test_a_source_is_read_once_for_its_checksum(tars: tuple[Path, Path], tmp_path: Path) -> None:
    """So that a build of days which is interrupted often does not begin with an hour of reading each time."""
    train, out = tars[0], tmp_path / "shards"
    good = hashlib.sha256(train.read_bytes()).hexdigest()
    build(train, out, split="train", checksum=good)
    before = train.stat()
    content = bytearray(train.read_bytes())
    content[2 * 512 + 100] ^= 1  # in the first image of the first class's tar, behind the back of the note
    train.write_bytes(content)
    os.utime(train, ns=(before.st_atime_ns, before.st_mtime_ns))
    build(train, out, split="train", checksum=good)
    os.utime(train)
    with pytest.raises(DataError, match="it is damaged"):
        build(train, out, split="train", checksum=good)


@pytest.mark.parametrize("wrong", ["", "sha256:12", "crc:00", "z" * 64])
def test_what_is_no_checksum(wrong: str) -> None:
    with pytest.raises(ConfigError, match="allowed: md5:HEX"):
        parse_checksum(wrong)
