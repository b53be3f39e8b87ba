from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from hpccl.data.shards.sources import Listing, SourceReader, scan
from hpccl.errors import DataError
from tests.unit.data.tiny_images import per_class_tars, tar_bytes, tiny_set, write_folder, write_zip


def contents(source: Path, listing: Listing) -> dict[str, dict[str, list[bytes]]]:
    reader = SourceReader(source)
    read = {
        split: {name: [reader.read(member) for member in members] for name, members in by_class.items()}
        for split, by_class in listing.items()
    }
    reader.close()
    return read


def expected(files: dict[str, bytes]) -> dict[str, dict[str, list[bytes]]]:
    result: dict[str, dict[str, list[bytes]]] = {}
    for path, data in sorted(files.items()):
        *split, name, _ = path.split("/")
        result.setdefault("".join(split), {}).setdefault(name, []).append(data)
    return result


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    """By suffix, in class folders; text beside images is no image that somebody may miss."""
    files = {f"{label}/{number}.{kind}": b"x" for label in "ab" for number, kind in enumerate(("jpg", "avif", "XML"))}
    files |= {"a/4.JP2": b"x", "b/name": b"x", "licence.pdf": b"x", "a/._4.avif": b"x"}
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    (tmp_path / "tars.tar").write_bytes(tar_bytes(per_class_tars({k: v for k, v in files.items() if "/" in k})))
    folder = write_folder(tmp_path / "set", files)
    (folder / "a" / "gone").symlink_to("nowhere")
    for source in (folder, write_zip(tmp_path / "set.zip", files), tmp_path / "set.tar", tmp_path / "tars.tar"):
        notes: list[str] = []
        assert {name: len(members) for name, members in scan(source, note=notes.append)[""].items()} == {"a": 1, "b": 1}
        assert notes == ["4 files were left out: .avif (2), .jp2 (1), no extension (1)"]


@pytest.mark.parametrize("splits", [("",), ("train", "val", "test")])
def test_every_kind_of_source_gives_the_same_images(tmp_path: Path, splits: tuple[str, ...]) -> None:
    files = tiny_set(splits=splits)
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    (tmp_path / "tars.tar").write_bytes(tar_bytes(per_class_tars(files)))
    sources = [
        write_folder(tmp_path / "folder", files),
        write_folder(tmp_path / "folder_of_tars", per_class_tars(files)),
        write_zip(tmp_path / "stored.zip", files),
        write_zip(tmp_path / "deflated.zip", files, zipfile.ZIP_DEFLATED),
        tmp_path / "set.tar",
        tmp_path / "tars.tar",
    ]
    for source in sources:
        assert contents(source, scan(source)) == expected(files), source.name


def test_a_packed_outer_folder_and_junk_are_ignored(tmp_path: Path) -> None:
    files = tiny_set()
    packed = {f"./my_set/{path}": data for path, data in files.items()}
    junk = {"__MACOSX/my_set/train/class_0/._img.png": b"x", "my_set/.hidden/a.png": b"x", "my_set/README.txt": b"x"}
    source = write_zip(tmp_path / "set.zip", {**packed, **junk})
    assert contents(source, scan(source)) == expected(files)


def test_splits_are_found_below_several_outer_folders(tmp_path: Path) -> None:
    """As in Kaggle's archive of ImageNet."""
    files = tiny_set(splits=("train", "val"))
    packed = {f"ILSVRC/Data/CLS-LOC/{path}": data for path, data in files.items()}
    for source in (write_zip(tmp_path / "set.zip", packed), write_folder(tmp_path / "set", packed)):
        assert contents(source, scan(source)) == expected(files)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["Train/{0}/a.png", "Test/{0}/a.png"], "Test, Train"),
        (["a/b/training/{0}/a.png", "a/b/validation/{0}/a.png"], "training, validation"),
        (["ILSVRC/Data/train/{0}/a.png", "ILSVRC/Data/val/{0}.png"], "train, val"),
        (["{0}/train/a.png", "{0}/test/a.png"], "test, train"),
        (["cifar/train/{0}/a.png", "mnist/train/{0}/a.png"], "train"),
    ],
)
def test_splits_are_not_taken_for_classes(tmp_path: Path, names: list[str], found: str) -> None:
    files = {name.format(label): b"x" for name in names for label in ("cat", "dog")}
    with pytest.raises(DataError, match=rf"lie in folders called {found}, which are splits, not classes"):
        scan(write_folder(tmp_path / "set", files))


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    files = {path.replace("class_0", "train"): data for path, data in tiny_set(splits=("",)).items()}
    assert set(scan(write_folder(tmp_path / "set", files))[""]) == {"train", "class_1", "class_2"}


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/../../evil.png", "/etc/evil.png", "train\\..\\..\\evil.png", "C:/x.png"]
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    files = {**tiny_set(), name: b"x"}
    sources = [write_zip(tmp_path / "set.zip", files), tmp_path / "set.tar", tmp_path / "tars.tar"]
    sources[1].write_bytes(tar_bytes(files))
    sources[2].write_bytes(tar_bytes({"class_0.tar": tar_bytes({name: b"x"})}))
    for source in sources:
        with pytest.raises(DataError, match=r"points outside the archive"):
            scan(source)


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        entry = tarfile.TarInfo("class_0/a.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(DataError, match=r"'class_0/a.png' .* is a link"):
        scan(tmp_path / "set.tar")


def test_circular_links_in_a_folder_end(tmp_path: Path) -> None:
    files = tiny_set(splits=("",))
    source = write_folder(tmp_path / "set", files)
    (source / "class_0" / "again").symlink_to(source / "class_0")
    assert contents(source, scan(source)) == expected(files)


def test_a_truncated_tar_and_zip_are_named(tmp_path: Path) -> None:
    whole = tar_bytes(tiny_set(splits=("",)))
    (tmp_path / "set.tar").write_bytes(whole[: len(whole) // 3])
    zipped = write_zip(tmp_path / "set.zip", tiny_set()).read_bytes()
    (tmp_path / "set.zip").write_bytes(zipped[: len(zipped) // 2])
    for name in ("set.tar", "set.zip"):
        with pytest.raises(DataError, match=name):
            scan(tmp_path / name)


def damaged(whole: bytes, how: str) -> bytes:
    """Cut or altered at the header of the third member, where tarfile sees the end of the archive."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        at = archive.getmembers()[2].offset
    flipped = bytearray(whole)
    flipped[at + 10] ^= 0xFF
    return {
        "cut between members": whole[:at],
        "cut in a header": whole[: at + 200],
        "cut in padding": whole[: at - 10],
        "a flipped bit": bytes(flipped),
        "a hole": whole[:at] + bytes(512) + whole[at + 512 :],
        "no end mark": whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512),
        "two archives": whole + whole,
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "cut between members",
        "cut in a header",
        "cut in padding",
        "a flipped bit",
        "a hole",
        "no end mark",
        "two archives",
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_a_tar_that_is_damaged_in_a_header_loses_no_image_silently(tmp_path: Path, how: str, inner: bool) -> None:
    files = tiny_set(splits=("",))
    whole = tar_bytes({name.partition("/")[2]: data for name, data in files.items()} if inner else files)
    broken = damaged(whole, how)
    source = tmp_path / "set.tar"
    source.write_bytes(tar_bytes({"a.tar": whole, "b.tar": broken, "c.tar": whole}) if inner else broken)
    with pytest.raises(DataError, match=r"set\.tar' is (damaged|truncated|neither)"):
        scan(source)


def test_an_altered_zip_is_found_by_its_checksum(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "set.zip", tiny_set(splits=("",)))
    member = scan(source)[""]["class_0"][0]
    data = bytearray(source.read_bytes())
    data[member.offset + 100] ^= 1
    source.write_bytes(data)
    reader = SourceReader(source)
    with pytest.raises(DataError, match=r"img_00.JPEG' .* truncated or altered"):
        reader.read(member)
    reader.close()


def test_unusable_sources_say_why(tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_bytes(tiny_set())))
    (tmp_path / "text").write_text("hello")
    write_folder(tmp_path / "flat", {"a.png": b"x", "b.png": b"x"})
    write_folder(tmp_path / "empty", {"readme.txt": b"x"})
    for name, message in {
        "set.tar.gz": "compressed .gzip.*unpack it",
        "text": "neither a folder, a zip nor a whole tar",
        "flat": "'a.png' .* has no class",
        "empty": "no images",
        "missing": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            scan(tmp_path / name)


@pytest.mark.parametrize(("split", "wrapper"), [("", ""), ("train", ""), ("", "set/"), ("train", "set/")])
def test_a_class_folder_without_images_is_refused(tmp_path: Path, split: str, wrapper: str) -> None:
    files = {f"{wrapper}{path}": data for path, data in tiny_set(splits=(split,)).items()}
    source = write_folder(tmp_path / "source", files)
    folder = source / wrapper / split / "class_9"
    (folder / "deeper").mkdir(parents=True)
    (folder / "picture.heic").write_bytes(b"of a kind that is not read")
    (source / wrapper / split / ".hidden").mkdir()
    with pytest.raises(DataError, match=rf"class folder '{folder}' has no images \(1 of 4 such folders\)"):
        scan(source)
    (folder / "deeper" / "picture.png").write_bytes(b"x")
    assert "class_9" in scan(source)[split]


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """As in archives that were made when Latin-1 was usual."""
    folder = os.fsdecode(b"caf\xe9")
    source = write_folder(tmp_path / "set", {f"{folder}/a.png": b"x", "b/a.png": b"x"})
    with pytest.raises(DataError, match=r"class 'caf\\udce9' in .* is not UTF-8: rename its folder"):
        scan(source)


def test_folders_beside_the_splits_and_classes_of_their_names_are_left_alone(tmp_path: Path) -> None:
    files = tiny_set(splits=("train", "val"))
    files = {path.replace("class_0", "train"): data for path, data in files.items()}
    source = write_folder(tmp_path / "source", files)
    (source / "devkit").mkdir()
    assert set(scan(source)["train"]) == {"train", "class_1", "class_2"}
