"""What is learned from: read the same from every kind of dataset, split, sized, ordered, and encoded once."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.training import data
from mahlstick.training.cache import FeatureCache
from mahlstick.training.data import (
    Example,
    FileSource,
    Plan,
    bucket_sizes,
    fit,
    fit_control,
    read_dataset,
    repeated,
    split,
)


def picture(seed: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png(seed: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, format="PNG")
    return buffer.getvalue()


def lay(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files below the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    folder.mkdir(exist_ok=True)
    return folder


def pack(path: Path, files: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(MahlstickError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message, f"no way out is named: {message}"
    for word in words:
        assert word in message, message


def names(examples: list[Example]) -> list[str]:
    return [example.name for example in examples]


# --- a folder of pictures


def test_a_folder_with_caption_files(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    picture().save(jpeg, format="JPEG")
    lay(
        tmp_path,
        {
            "fox.png": png(1),
            "fox.txt": "a red fox\n\n  a fox in the snow \n",
            "deep/er/owl.JPG": jpeg.getvalue(),
            "deep/er/owl.txt": "\ufeffan öwl",
            "bare.png": png(2),
            "blank.png": png(3),
            "blank.txt": "\n \n",
            ".hidden.png": png(4),
            ".cache/thumbnail.png": png(5),
            "notes.md": "not a picture",
        },
    )
    examples = read_dataset(tmp_path)
    assert {example.name: example.captions for example in examples} == {
        "bare.png": ("",),
        "blank.png": ("",),
        "deep/er/owl.JPG": ("an öwl",),
        "fox.png": ("a red fox", "a fox in the snow"),
    }
    assert names(examples) == sorted(names(examples))
    fox = examples[-1]
    assert np.array_equal(fox.load(), picture(1))
    assert fox.control is None and fox.reference is None
    refused(lambda: fox.load("control"), "'fox.png'", "control")
    assert read_dataset(str(tmp_path)) == examples


@pytest.mark.parametrize("extension", data.EXTENSIONS)
def test_every_extension_that_errors_name_is_read(tmp_path: Path, extension: str) -> None:
    lay(tmp_path, {f"one.{extension.upper()}": png()})
    (example,) = read_dataset(tmp_path)
    assert np.array_equal(example.load(), picture())


def test_partners_from_folders_beside_or_below(tmp_path: Path) -> None:
    lay(tmp_path, {"set/fox.png": png(1), "set/in/owl.png": png(2)})
    lay(tmp_path, {"edges/fox.png": png(3), "edges/in/owl.webp": png(4), "edges/spare.png": png(5)})
    lay(tmp_path, {"set/style/fox.png": png(6), "set/style/in/owl.png": png(7)})
    fox, owl = read_dataset(tmp_path / "set", control=tmp_path / "edges", reference=tmp_path / "set/style")
    assert [fox.name, owl.name] == ["fox.png", "in/owl.png"]
    assert np.array_equal(owl.load("control"), picture(4))
    assert np.array_equal(owl.load("reference"), picture(7))
    assert np.array_equal(fox.load("control"), picture(3))


def test_subfolders_named_control_and_reference_are_partners(tmp_path: Path) -> None:
    lay(tmp_path, {"fox.png": png(1), "control/fox.png": png(2), "reference/fox.png": png(3)})
    (fox,) = read_dataset(tmp_path)
    assert np.array_equal(fox.load("control"), picture(2))
    assert np.array_equal(fox.load("reference"), picture(3))


def test_of_two_partners_the_same_file_name_counts(tmp_path: Path) -> None:
    lay(tmp_path, {"set/fox.png": png(1), "edges/fox.png": png(2), "edges/fox.jpg": png(3)})
    (fox,) = read_dataset(tmp_path / "set", control=tmp_path / "edges")
    assert np.array_equal(fox.load("control"), picture(2))
    (tmp_path / "edges/fox.png").rename(tmp_path / "edges/fox.bmp")
    refused(lambda: read_dataset(tmp_path / "set", control=tmp_path / "edges"), "'fox.png'", "2 of control")


def test_missing_partners_are_named(tmp_path: Path) -> None:
    lay(tmp_path, {f"set/{number}.png": png(number) for number in range(6)} | {"edges/2.png": png(9)})
    refused(
        lambda: read_dataset(tmp_path / "set", control=tmp_path / "edges"),
        "5 of 6 pictures have no control",
        str(tmp_path / "edges"),
        "'0.png', '1.png', '3.png' and 2 more",
    )
    (tmp_path / "edges/2.png").unlink()
    refused(lambda: read_dataset(tmp_path / "set", reference=tmp_path / "edges"), "6 of 6 pictures have no reference")
    refused(lambda: read_dataset(tmp_path / "set", control=tmp_path / "edge"), "control folder", "does not exist")


def test_folders_that_cannot_be_learned_from(tmp_path: Path) -> None:
    refused(lambda: read_dataset(tmp_path / "nowhere"), "nowhere", "does not exist")
    refused(lambda: read_dataset(tmp_path / "no*.tar"), "no*.tar", "does not exist")
    empty = lay(tmp_path / "empty", {"notes.md": "nothing"})
    refused(lambda: read_dataset(empty), str(empty), "no pictures", "jpg", "avif")
    refused(lambda: read_dataset(empty / "notes.md"), "notes.md", "no dataset")
    lone = lay(tmp_path / "lone", {f"{name}.txt": "words" for name in "abcde"} | {"e.png": png()})
    refused(lambda: read_dataset(lone), "captions without pictures", "'a.txt', 'b.txt', 'c.txt' and 1 more")
    double = lay(tmp_path / "double", {"a.png": png(1), "a.jpg": png(2)})
    refused(lambda: read_dataset(double), "a.jpg", "a.png", "share one name")
    latin = lay(tmp_path / "latin", {"a.png": png(), "a.txt": "öwl".encode("latin-1")})
    refused(lambda: read_dataset(latin), "a.txt", "UTF-8")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    lay(tmp_path, {"fox.png": png(), "locked/owl.png": png()})
    (tmp_path / "locked").chmod(0)
    try:
        refused(lambda: read_dataset(tmp_path), "locked", "permissions")
    finally:
        (tmp_path / "locked").chmod(0o700)


# --- metadata.jsonl


def test_metadata_gives_captions_and_partners(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"file_name": "in/fox.png", "text": "a fox", "conditioning_image": "lines/fox.png", "reference": "style.png"},
        {
            "file_name": "owl.png",
            "captions": ["an owl", "a bird"],
            "control": "lines/owl.png",
            "reference": "style.png",
        },
        {"file_name": "elk.png", "control_file_name": "lines/elk.png", "reference": "style.png"},
    ]
    drawn = {f"lines/{name}.png": png(seed) for seed, name in enumerate(("fox", "owl", "elk"), start=10)}
    lay(tmp_path, {"in/fox.png": png(1), "owl.png": png(2), "elk.png": png(3), "style.png": png(4), **drawn})
    lay(tmp_path, {"metadata.jsonl": "\n" + lines(*rows), "owl.txt": "not this", "stray.txt": "nor this"})
    elk, fox, owl = read_dataset(tmp_path)
    assert names([elk, fox, owl]) == ["elk.png", "in/fox.png", "owl.png"]
    assert [elk.captions, fox.captions, owl.captions] == [("",), ("a fox",), ("an owl", "a bird")]
    assert [np.array_equal(one.load("control"), picture(seed)) for one, seed in ((fox, 10), (owl, 11), (elk, 12))] == [
        True,
        True,
        True,
    ]
    assert np.array_equal(fox.load("reference"), picture(4))
    assert not caplog.records

    lay(tmp_path, {"forgotten.png": png(9)})
    assert len(read_dataset(tmp_path)) == 3
    assert "forgotten.png" in caplog.text


def test_metadata_in_each_subfolder_and_a_folder_of_partners(tmp_path: Path) -> None:
    lay(
        tmp_path, {"a/x.png": png(1), "b/x.png": png(2), "a/metadata.jsonl": lines({"file_name": "x.png", "text": "a"})}
    )
    lay(tmp_path, {"b/metadata.jsonl": lines({"file_name": "x.png", "caption": "b"})})
    lay(tmp_path, {"edges/a/x.png": png(3), "edges/b/x.png": png(4)})
    first, second = read_dataset(tmp_path, control=tmp_path / "edges")
    assert [(one.name, one.captions) for one in (first, second)] == [("a/x.png", ("a",)), ("b/x.png", ("b",))]
    assert np.array_equal(second.load("control"), picture(4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lines({"file_name": "a.png", "text": "x"}) + "{oops\n", ("line 2", "not JSON")),
        ("[1]\n", ("line 1", "not an object")),
        (lines({"text": "x"}), ("line 1", "file_name")),
        (lines({"file_name": 3}), ("line 1", "3")),
        (lines({"file_name": "b.png", "text": "x"}), ("line 1", "'b.png'", "not there")),
        (lines({"file_name": "a.png", "control": "c.png"}), ("line 1", "'c.png'", "not there")),
        (lines({"file_name": "a.png", "text": 7}), ("line 1", "7", "caption")),
        (lines({"file_name": "a.png", "repeats": 0}), ("line 1", "0 for repeats", "from 1")),
        (lines({"file_name": "a.png", "repeats": "2"}), ("line 1", "'2' for repeats")),
        (lines({"file_name": "a.png", "text": "x"}, {"file_name": "./a.png", "text": "y"}), ("line 2", "second time")),
        (
            lines({"file_name": "a.png", "control": "a.png"}, {"file_name": "o.png"}),
            ("1 of 2 pictures have no control", "'o.png'"),
        ),
        ("\n", ("no pictures",)),
    ],
)
def test_metadata_that_cannot_be_right(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    lay(tmp_path, {"a.png": png(), "o.png": png(1), "metadata.jsonl": text})
    refused(lambda: read_dataset(tmp_path), *words)


def test_a_picture_is_learned_from_as_often_as_its_line_says(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "repeats": 3}, {"file_name": "o.png"}]
    lay(tmp_path, {"a.png": png(), "o.png": png(1), "metadata.jsonl": lines(*rows)})
    assert names(repeated(read_dataset(tmp_path))) == ["a.png", "a.png", "a.png", "o.png"]


# --- WebDataset shards


def test_shards_hold_what_the_folder_holds(tmp_path: Path) -> None:
    files = {f"in/{number:03d}.png": png(number) for number in range(8)}
    captions = {f"in/{number:03d}.txt": f"picture {number}\nsaid otherwise" for number in range(8)}
    edges = {f"in/{number:03d}.png": png(100 + number) for number in range(8)}
    lay(tmp_path / "set", files | captions)
    lay(tmp_path / "edges", edges)
    # Members of a sample apart from each other, and a name too long for a plain header.
    members = files | captions | {name.replace(".png", ".control.png"): content for name, content in edges.items()}
    order = sorted(members, key=lambda name: name[::-1])
    halves = [[name for name in order if (int(name[3:6]) < 4) == low] for low in (True, False)]
    for number, half in enumerate(halves):
        pack(tmp_path / f"shards/{number}.tar", {f"./{'x' * 120}/{name}": members[name] for name in half})

    loose = read_dataset(tmp_path / "set", control=tmp_path / "edges")
    packed = read_dataset(tmp_path / "shards")
    assert [Path(example.name).name for example in packed] == [f"{number:03d}" for number in range(8)]
    assert [example.captions for example in packed] == [example.captions for example in loose]
    assert [example.digest() for example in packed] == [example.digest() for example in loose]
    for number in random.Random(0).sample(range(8), 8):
        assert np.array_equal(packed[number].load(), picture(number))
        assert np.array_equal(packed[number].load("control"), picture(100 + number))
    assert read_dataset(tmp_path / "shards/*.tar") == packed
    assert [example.digest() for example in read_dataset(tmp_path / "shards/1.tar")] == [
        example.digest() for example in packed[4:]
    ]


def test_shard_captions_and_what_is_ignored(tmp_path: Path) -> None:
    shard = pack(
        tmp_path / "a.tar",
        {
            "0.png": png(0),
            "0.json": '{"caption": "from json", "width": 3}',
            "1.png": png(1),
            "1.json": '{"text": "not this"}',
            "1.txt": "from text",
            "2.png": png(2),
            "2.seg.png": png(9),
            "2.cls": "7",
            "._3.png": png(3),
        },
    )
    examples = read_dataset(shard)
    assert [(one.name, one.captions) for one in examples] == [
        ("a.tar/0", ("from json",)),
        ("a.tar/1", ("from text",)),
        ("a.tar/2", ("",)),
    ]


def test_one_key_in_two_shards_is_two_examples(tmp_path: Path) -> None:
    for part in ("x", "y"):
        pack(tmp_path / part / "0.tar", {"0.png": png(ord(part))})
    assert names(read_dataset(tmp_path)) == ["x/0.tar/0", "y/0.tar/0"]
    assert names(read_dataset(tmp_path / "*/0.tar")) == ["x/0.tar/0", "y/0.tar/0"]


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    plain = pack(tmp_path / "plain.tar", {f"{number}.png": png(number) for number in range(4)})
    content = plain.read_bytes()
    member = 512 + math.ceil(len(png()) / 512) * 512

    def shard(name: str, content: bytes) -> Callable[[], object]:
        (tmp_path / name).write_bytes(content)
        return lambda: read_dataset(tmp_path / name)

    refused(shard("cut.tar", content[: member + 700]), "cut.tar", "damaged")
    refused(shard("header.tar", content[:member] + b"x" * 512 + content[member + 512 :]), "header.tar", str(member))
    refused(shard("words.tar", b"no archive" * 100), "words.tar", "damaged")
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(plain)
    refused(lambda: read_dataset(packed), "packed.tar", "compressed")
    refused(shard("shard.zip", content), "shard.zip", "no dataset")

    refused(lambda: read_dataset(pack(tmp_path / "none.tar", {"a.cls": "1"})), "none.tar", "no pictures")
    lone = {"a.png": png(), "b.txt": "words", "c.json": "{}"}
    refused(lambda: read_dataset(pack(tmp_path / "lone.tar", lone)), "captions without pictures", "'b', 'c'")
    refused(lambda: read_dataset(pack(tmp_path / "two.tar", {"a.png": png(), "a.jpg": png()})), "two.tar", "a.jpg")
    bad = {"a.png": png(), "a.json": "{oops"}
    refused(lambda: read_dataset(pack(tmp_path / "bad.tar", bad)), "bad.tar", "'a'", "not JSON")
    some = {"a.png": png(), "a.control.png": png(), "b.png": png()}
    refused(lambda: read_dataset(pack(tmp_path / "some.tar", some)), "1 of 2 pictures have no control", "some.tar/b")
    refused(lambda: read_dataset(plain, control=tmp_path), "control folder", "fox.control.png")
    both = lay(tmp_path / "both", {"a.png": png(), "a.tar": content})
    refused(lambda: read_dataset(both), "both pictures and .tar files")


# --- Hugging Face datasets


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def rows(datasets, count: int = 3):
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "conditioning_image": datasets.Image()}
    )
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in range(count)],
        "text": [f"picture {number}" for number in range(count - 1)] + [None],
        "conditioning_image": [{"bytes": png(100 + number), "path": None} for number in range(count)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def check_rows(examples: list[Example], count: int = 3) -> None:
    assert [example.captions for example in examples] == [(f"picture {n}",) for n in range(count - 1)] + [("",)]
    for number in reversed(range(count)):
        assert np.array_equal(examples[number].load(), picture(number))
        assert np.array_equal(examples[number].load("control"), picture(100 + number))
        assert examples[number].picture.read() == png(number)
        assert examples[number].reference is None


def test_a_saved_dataset(tmp_path: Path, hugging_face) -> None:
    rows(hugging_face).save_to_disk(tmp_path / "saved")
    examples = read_dataset(tmp_path / "saved")
    check_rows(examples)
    assert pickle.loads(pickle.dumps(examples)) == examples

    splits = hugging_face.DatasetDict({"test": rows(hugging_face, 2), "train": rows(hugging_face)})
    splits.save_to_disk(tmp_path / "splits")
    check_rows(read_dataset(tmp_path / "splits"))
    hugging_face.DatasetDict({"a": splits["test"], "b": splits["test"]}).save_to_disk(tmp_path / "unclear")
    refused(lambda: read_dataset(tmp_path / "unclear"), "splits a, b")
    # The same folder written anew is read anew.
    rows(hugging_face, 12).save_to_disk(tmp_path / "other")
    (tmp_path / "saved").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "saved")
    check_rows(read_dataset(tmp_path / "saved"), 12)


def test_parquet_files(tmp_path: Path, hugging_face) -> None:
    rows(hugging_face).to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    rows(hugging_face, 5).to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    check_rows(read_dataset(tmp_path / "set"))


def test_datasets_that_cannot_be_learned_from(tmp_path: Path, hugging_face) -> None:
    hugging_face.Dataset.from_dict({"pixels": [1], "text": ["x"]}).save_to_disk(tmp_path / "columns")
    refused(lambda: read_dataset(tmp_path / "columns"), "pixels, text", "image")
    broken = lay(tmp_path / "broken", {"a.parquet": b"PAR1 and no more"})
    refused(lambda: read_dataset(broken), "broken", "cannot be read as a dataset")
    rows(hugging_face).save_to_disk(tmp_path / "saved")
    refused(lambda: read_dataset(tmp_path / "saved", control=tmp_path), "control folder", "columns")
    gap = rows(hugging_face).to_dict() | {"image": [None] * 3}
    features = rows(hugging_face).features
    hugging_face.Dataset.from_dict(gap, features=features).save_to_disk(tmp_path / "gap")
    refused(read_dataset(tmp_path / "gap")[1].load, "row-000000001", "no picture")


def test_without_datasets_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    lay(tmp_path, {"state.json": "{}"})
    refused(lambda: read_dataset(tmp_path), str(tmp_path), "pip install datasets")


# --- examples


def test_the_digest_is_of_everything_that_is_learned(tmp_path: Path) -> None:
    lay(tmp_path, {"a.png": png(1), "b.png": png(2)})
    one, two = FileSource(tmp_path / "a.png"), FileSource(tmp_path / "b.png")
    example = Example("x", ("a", "b"), one, control=one)
    different = [
        example,
        dataclasses.replace(example, picture=two),
        dataclasses.replace(example, control=two),
        dataclasses.replace(example, control=None),
        dataclasses.replace(example, control=None, reference=one),
        dataclasses.replace(example, captions=("a",)),
        dataclasses.replace(example, captions=("ab",)),
        dataclasses.replace(example, captions=("b", "a")),
    ]
    assert len({other.digest() for other in different}) == len(different)
    assert dataclasses.replace(example, name="renamed").digest() == example.digest()
    assert re.fullmatch("[0-9a-f]{64}", example.digest())


def test_examples_travel_and_keep_their_digest(tmp_path: Path) -> None:
    lay(tmp_path, {"a.png": png(1)})
    (example,) = read_dataset(tmp_path)
    digest = example.digest()
    (tmp_path / "a.png").unlink()
    sent = pickle.loads(pickle.dumps(example))
    assert sent == example
    assert sent.digest() == digest
    refused(sent.load, "picture 'a.png'", "cannot be read")


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    lay(tmp_path, {"in/a.png": png()[:60], "control/in/a.png": b"words"})
    (example,) = read_dataset(tmp_path)
    refused(example.load, "picture 'in/a.png'", "damaged")
    refused(lambda: example.load("control"), "control of 'in/a.png'", "not a picture")


# --- validation


def many(folder: Path, count: int, rows_each: int = 1) -> list[Example]:
    """Examples of ``count`` pictures, each in several rows with captions of their own. No decoder sees them."""
    lay(folder, {f"{number}.png": str(number) for number in range(count)})
    return [
        Example(f"{number}-{row}", (f"{row}",), FileSource(folder / f"{number}.png"))
        for number in range(count)
        for row in range(rows_each)
    ]


def test_split_is_by_picture_and_complete(tmp_path: Path) -> None:
    examples = many(tmp_path, 200, rows_each=2)
    train, held_out = split(examples, 0.2)
    assert sorted(names(train) + names(held_out)) == sorted(names(examples))
    assert not {one.picture for one in train} & {one.picture for one in held_out}
    assert 20 < len(held_out) / 2 < 60
    assert names(train) == [name for name in names(examples) if name in set(names(train))]
    assert split(examples, 0) == (examples, [])


def test_split_depends_on_content_and_seed_alone(tmp_path: Path) -> None:
    examples = many(tmp_path, 60)
    held_out = set(names(split(examples, 0.3)[1]))
    assert set(names(split(examples[::-1], 0.3)[1])) == held_out
    renamed = [dataclasses.replace(one, name=f"new {one.name}", captions=("other",)) for one in examples]
    assert {name.removeprefix("new ") for name in names(split(renamed, 0.3)[1])} == held_out
    assert set(names(split(examples, 0.3, seed=1)[1])) != held_out


def test_split_stays_as_pictures_come_and_go(tmp_path: Path) -> None:
    examples = many(tmp_path, 80)
    before = set(names(split(examples[:40], 0.3)[1]))
    assert {name for name in names(split(examples, 0.3)[1]) if name in names(examples[:40])} == before
    assert set(names(split(examples, 0.1)[1])) < set(names(split(examples, 0.3)[1]))


@pytest.mark.parametrize("share", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_split_leaves_no_side_empty(tmp_path: Path, share: float, count: int) -> None:
    for seed in range(10):
        train, held_out = split(many(tmp_path, count, rows_each=2), share, seed)
        assert train and held_out
        assert min(len(train), len(held_out)) == 2
        assert len(train) + len(held_out) == 2 * count


def test_split_of_one_picture_and_of_unreadable_ones(tmp_path: Path) -> None:
    examples = many(tmp_path, 1, rows_each=3)
    assert split(examples, 0.9) == (examples, [])
    gone = [Example(f"gone {number}", ("",), FileSource(tmp_path / f"gone{number}.png")) for number in range(20)]
    assert split([*gone, *examples], 0.9) == ([*gone, *examples], [])
    for share in (-0.1, 1, 1.5):
        refused(lambda share=share: split(examples, share), "share", str(share))


# --- sizes


@given(st.integers(1, 2048), st.sampled_from([1, 8, 32, 64]), st.floats(1, 6))
def test_bucket_sizes(resolution: int, step: int, longest: float) -> None:
    resolution = min(resolution, 200 * step)
    square = max(1, round(resolution / step)) * step
    assert abs(square - resolution) <= step / 2 or square == step
    buckets = bucket_sizes(resolution, step, longest)
    assert (square, square) in buckets
    assert len(set(buckets)) == len(buckets)
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % step == height % step == 0
        assert max(width, height) <= longest * min(width, height)
        assert square**2 - min(width, height) * step < width * height <= square**2
    aspects = [width / height for width, height in buckets]
    assert aspects == sorted(aspects)


def test_bucket_sizes_known() -> None:
    wide = [(448, 576), (384, 640)]
    assert bucket_sizes(512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert {size for size in bucket_sizes(1024) if size[0] < size[1]} >= {(768, 1344), (832, 1216), (896, 1152)}
    assert bucket_sizes(512, longest=1) == [(512, 512)]
    assert set(wide) < set(bucket_sizes(512))
    for bad in ((0,), (512, 0), (512, 64, 0.5)):
        refused(lambda bad=bad: bucket_sizes(*bad), "buckets")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_bucket_distorts_least(width: int, height: int) -> None:
    buckets = bucket_sizes(512)

    def distortion(size: tuple[int, int]) -> float:
        ratio = size[0] / size[1] * height / width
        return max(ratio, 1 / ratio)

    nearest = data.nearest_bucket((width, height), buckets)
    assert distortion(nearest) <= min(map(distortion, buckets)) * (1 + 1e-9)
    assert nearest == data.nearest_bucket((width, height), buckets[::-1])
    assert data.nearest_bucket((1, 1), [(1, 2), (2, 1)]) == data.nearest_bucket((1, 1), [(2, 1), (1, 2)])
    # Turned on its side, a picture gets the bucket on its side.
    assert data.nearest_bucket((height, width), buckets) == nearest[::-1] or width == height


def test_control_gets_the_crop_of_its_picture() -> None:
    y, x = np.mgrid[:60, :100]
    shown = Image.fromarray(np.stack([x * 2, y * 4, x + y], axis=2).astype(np.uint8))
    cut = fit(shown, (32, 32))
    assert cut.size == (32, 32)
    # The middle 60 columns of 100, so red runs from 20 · 2 to 80 · 2.
    red = np.asarray(cut)[:, :, 0].astype(int)
    assert abs(red.min() - 40) < 8 and abs(red.max() - 160) < 8
    assert np.array_equal(fit_control(shown, shown, (32, 32)), cut)
    half = shown.resize((50, 30), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(fit_control(half, shown, (32, 32)), int) - np.asarray(cut, int)).mean() < 3
    nearly = shown.resize((100, 61))
    assert fit_control(nearly, shown, (16, 32)).size == (16, 32)
    refused(
        lambda: fit_control(shown.resize((100, 64)), shown, (32, 32), "control of 'fox.png'"),
        "control of 'fox.png'",
        "100x64",
        "100x60",
    )


# --- order


BUCKETS = ["wide"] * 7 + ["tall"] * 2 + ["square"] * 8 + ["wide"] * 3


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 9), st.integers(-5, 2**40))
@settings(max_examples=60)
def test_each_epoch_shows_every_example(bucket_of: list[str], batch: int, seed: int) -> None:
    plan = Plan(bucket_of, batch, seed)
    assert plan.steps_per_epoch == sum(math.ceil(count / batch) for count in Counter(bucket_of).values())
    for epoch in range(3):
        batches = [plan.batch_at(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        seen = Counter(itertools.chain(*batches))
        assert set(seen) == set(range(len(bucket_of)))
        for one in batches:
            assert len(one) == batch
            assert len({bucket_of[index] for index in one}) == 1
        for bucket, count in Counter(bucket_of).items():
            times = [seen[index] for index in range(len(bucket_of)) if bucket_of[index] == bucket]
            assert max(times) - min(times) <= 1, "the filling up favours some"
            assert sum(times) == math.ceil(count / batch) * batch


def test_a_plan_is_a_function_of_the_step() -> None:
    steps = list(range(40))
    plan = Plan(BUCKETS, 4, seed=3)
    expected = [plan.batch_at(step) for step in steps]
    random.Random(1).shuffle(steps)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    other = Plan(BUCKETS, 4, seed=3)
    assert [other.batch_at(step) for step in steps] == [expected[step] for step in steps]
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
    other.batch_at(0).clear()
    assert other.batch_at(0) == expected[0]


def test_epochs_and_seeds_differ() -> None:
    plan = Plan(range(1), 1, 0)
    assert plan.batch_at(0) == plan.batch_at(1) == [0]
    plan = Plan(["same"] * 50, 5, 0)
    first, second = ([plan.batch_at(epoch * 10 + step) for step in range(10)] for epoch in (0, 1))
    assert first != second
    assert {frozenset(batch) for batch in first}.isdisjoint({frozenset(batch) for batch in second})
    assert first != [Plan(["same"] * 50, 5, 1).batch_at(step) for step in range(10)]
    # The batches of a bucket do not come in a row.
    plan = Plan(["a"] * 20 + ["b"] * 20, 1, 0)
    order = [plan.batch_at(step)[0] < 20 for step in range(40)]
    assert sum(one != two for one, two in itertools.pairwise(order)) > 8


def test_a_plan_does_not_depend_on_the_hash_seed() -> None:
    # The buckets are texts, whose hashes differ from process to process.
    code = (
        "from mahlstick.training.data import Plan\n"
        f"plan = Plan({BUCKETS!r}, 4, seed=3)\n"
        "print([plan.batch_at(step) for step in range(20)])"
    )
    plan = Plan(BUCKETS, 4, seed=3)
    expected = str([plan.batch_at(step) for step in range(20)])
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr
    # A run that is resumed with a later version goes on with these.
    assert [plan.batch_at(step) for step in (0, 1, 9)] == [[5, 18, 1, 0], [8, 7, 8, 7], [13, 9, 14, 15]]


def test_plans_that_cannot_be() -> None:
    refused(lambda: Plan([], 1, 0), "no examples")
    refused(lambda: Plan(["a"], 0, 0), "batch of 0")


# --- the cache


def encode(examples: list[Example]) -> list[dict[str, Tensor]]:
    """Latents from the pixels, a text feature from the caption."""
    batch = [(example, np.asarray(example.load())) for example in examples]
    return [
        {
            "latents": torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.bfloat16),
            "text/pooled": torch.tensor([float(len(caption)) for caption in example.captions]),
        }
        for example, pixels in batch
    ]


class Counting:
    """`encode`, noting what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, examples: list[Example]) -> list[dict[str, Tensor]]:
        self.batches.append(names(examples))
        return encode(examples)

    @property
    def seen(self) -> list[str]:
        return [name for batch in self.batches for name in batch]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures, of two sizes, with captions."""
    files = {f"{number}.png": png(number, (8, 8) if number % 2 else (12, 8)) for number in range(10)}
    return lay(tmp_path / "pictures", files | {f"{number}.txt": "x" * number for number in range(10)})


def fill(cache: FeatureCache, examples: list[Example], encode=encode, **options: object):
    return cache.fill(examples, encode, progress=False, **options)


def check_features(cache: FeatureCache, examples: list[Example]) -> None:
    for example in examples:
        expected = encode([example])[0]
        found = cache[example.digest()]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        assert cache.shapes(example.digest()) == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def test_features_are_kept(tmp_path: Path, pictures: Path) -> None:
    examples = read_dataset(pictures)
    count = Counting()
    cache = FeatureCache(tmp_path / "cache", {"vae": "tiny", "size": 8})
    assert len(cache) == 0 and examples[0].digest() not in cache
    assert not (tmp_path / "cache").exists()
    report = fill(cache, examples, count, batch=3, shard=4)
    assert (report.cached, report.encoded, report.skipped) == (0, 10, [])
    assert [len(batch) for batch in count.batches] == [3, 3, 3, 1]
    assert len(list(cache.path.glob("features-*.safetensors"))) == 2
    check_features(cache, examples)

    again = FeatureCache(tmp_path / "cache", {"size": 8, "vae": "tiny"})
    assert set(again) == {example.digest() for example in examples}
    check_features(again, examples)
    report = fill(again, read_dataset(pictures), count)
    assert (report.cached, report.encoded) == (10, 0)
    assert len(count.seen) == 10
    with pytest.raises(KeyError):
        again["0" * 64]


def test_another_setting_is_another_cache(tmp_path: Path, pictures: Path) -> None:
    examples = read_dataset(pictures)
    caches = [FeatureCache(tmp_path / "cache", {"size": size, "vae": "ö"}) for size in (8, 16)]
    fill(caches[0], examples)
    assert len(caches[0]) == 10 and len(caches[1]) == 0
    assert fill(caches[1], examples).encoded == 10
    assert len(set((tmp_path / "cache").iterdir())) == 2
    for cache, size in zip(caches, (8, 16), strict=True):
        assert re.fullmatch("[0-9a-f]{16}", cache.path.name)
        assert json.loads((cache.path / "settings.json").read_text())["settings"] == {"size": size, "vae": "ö"}
    for bad in ({"size": float("nan")}, {"path": tmp_path}):
        refused(lambda bad=bad: FeatureCache(tmp_path, bad), "settings", "JSON")


def test_only_what_changed_is_encoded_again(tmp_path: Path, pictures: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", {})
    fill(cache, read_dataset(pictures))
    lay(pictures, {"3.txt": "a new caption", "5.png": png(55), "new.png": png(99)})
    count = Counting()
    report = fill(cache, read_dataset(pictures), count)
    assert count.seen == ["3.png", "5.png", "new.png"]
    assert (report.cached, report.encoded) == (8, 3)
    check_features(cache, read_dataset(pictures))


def test_parts_of_batches_and_shared_tensors_are_kept(tmp_path: Path, pictures: Path) -> None:
    examples = read_dataset(pictures)
    whole = torch.arange(10 * 6.0).reshape(10, 3, 2)
    empty = torch.ones(4, requires_grad=True)
    cache = FeatureCache(tmp_path / "cache", {})
    fill(cache, examples, lambda batch: [{"row": whole[i].T, "empty": empty} for i in range(len(batch))], batch=10)
    for row, example in enumerate(examples):
        assert torch.equal(cache[example.digest()]["row"], whole[row].T)
        assert torch.equal(cache[example.digest()]["empty"], empty)


def test_broken_pictures_are_named_skipped_and_counted(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay(pictures, {"4.png": png(4)[:70], "7.png": "words"})
    examples = read_dataset(pictures)
    examples[0].load()
    gone = examples[0]
    (pictures / "0.png").unlink()
    cache = FeatureCache(tmp_path / "cache", {})
    count = Counting()
    report = fill(cache, examples, count, batch=4)
    assert report.encoded == 7
    assert [name for name, _ in report.skipped] == ["0.png", "4.png", "7.png"]
    for (name, reason), word in zip(report.skipped, ("cannot be read", "damaged", "not a picture"), strict=True):
        assert name in reason and word in reason
        assert f"{name} is skipped: " in caplog.text
    assert "3 of 10 examples were skipped" in caplog.text
    assert cache.select(examples) == [one for one in examples if one.name not in ("0.png", "4.png", "7.png")]
    assert gone not in cache.select(examples)
    check_features(cache, cache.select(examples))

    lay(pictures, {"4.png": png(4), "0.png": png(0)})
    report = fill(cache, read_dataset(pictures))
    assert (report.cached, report.encoded, [name for name, _ in report.skipped]) == (7, 2, ["7.png"])


def test_what_pillow_raises_is_a_broken_picture_and_a_bug_is_not(tmp_path: Path, pictures: Path) -> None:
    lay(pictures, {"4.png": "words"})

    def by_pillow(examples: list[Example]) -> list[dict[str, Tensor]]:
        return [{"size": torch.tensor(Image.open(io.BytesIO(one.picture.read())).size)} for one in examples]

    report = fill(FeatureCache(tmp_path / "cache", {}), read_dataset(pictures), by_pillow)
    assert [name for name, _ in report.skipped] == ["4.png"]

    def bug(examples: list[Example]) -> list[dict[str, Tensor]]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fill(FeatureCache(tmp_path / "cache", {"other": 1}), read_dataset(pictures), bug)
    with pytest.raises(ValueError, match="shorter"):
        fill(FeatureCache(tmp_path / "cache", {"other": 2}), read_dataset(pictures), lambda batch: encode(batch[1:]))


def test_nothing_but_broken_pictures(tmp_path: Path) -> None:
    lay(tmp_path / "bad", {f"{number}.png": f"words {number}" for number in range(3)})
    cache = FeatureCache(tmp_path / "cache", {})
    refused(lambda: fill(cache, read_dataset(tmp_path / "bad")), "none of 3", "'0.png'", "not a picture")
    assert not cache.path.exists()
    assert fill(cache, []).skipped == []


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, pictures: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    real = os.fsync

    def run() -> None:
        def stop_in_third(descriptor: int) -> None:
            if len(list((tmp_path / "cache").rglob("features-*.safetensors"))) == 2:
                there.send("writing the third")
                time.sleep(600)
            real(descriptor)

        os.fsync = stop_in_third
        fill(FeatureCache(tmp_path / "cache", {}), read_dataset(pictures), batch=2, shard=3)

    process = context.Process(target=run)
    process.start()
    assert here.poll(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    cache = FeatureCache(tmp_path / "cache", {})
    assert len(cache) == 8
    (unfinished,) = cache.path.glob(".*.tmp")
    count = Counting()
    assert fill(cache, read_dataset(pictures), count).cached == 8
    assert count.seen == ["8.png", "9.png"]
    check_features(cache, read_dataset(pictures))
    assert not unfinished.exists()

    alive = cache.path / f".a.{os.getpid()}.{platform.node()}.tmp"
    elsewhere = cache.path / ".b.1.another-machine.tmp"
    for file in (alive, elsewhere):
        file.touch()
    fill(cache, read_dataset(pictures))
    assert alive.exists() and elsewhere.exists(), "a process may still be writing it"
    os.utime(elsewhere, (time.time() - 7200, time.time() - 7200))
    fill(cache, read_dataset(pictures))
    assert alive.exists() and not elsewhere.exists()


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_shard_is_set_aside(
    tmp_path: Path, pictures: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    examples = read_dataset(pictures)
    cache = FeatureCache(tmp_path / "cache", {})
    fill(cache, examples, batch=1, shard=4)
    shard = next(
        shard for shard in cache.path.glob("features-*") if examples[5].digest().encode() in shard.read_bytes()
    )
    content = shard.read_bytes()
    shard.write_bytes({"cut": content[:-20], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])

    again = FeatureCache(tmp_path / "cache", {})
    assert len(again) == 6
    assert f"{shard} is damaged" in caplog.text
    assert Path(f"{shard}.broken").exists() and not shard.exists()
    count = Counting()
    assert fill(again, examples, count, batch=1).encoded == 4
    assert count.seen == ["4.png", "5.png", "6.png", "7.png"]
    check_features(again, examples)


def test_a_full_disk_says_so_and_leaves_nothing_unfinished(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = read_dataset(pictures)
    cache = FeatureCache(tmp_path / "cache", {})
    real = os.fsync

    def full(descriptor: int) -> None:
        if len(list(cache.path.glob("features-*.safetensors"))) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused(
        lambda: fill(cache, examples, lambda batch: [{"x": torch.zeros(250_000)} for _ in batch], batch=2, shard=4),
        "disk is full",
        str(cache.path),
        "6.0 MB more",
        "are free",
        "goes on where it stopped",
    )
    assert sorted(path.suffix for path in cache.path.iterdir()) == [".json", ".safetensors"]
    monkeypatch.setattr(os, "fsync", real)
    count = Counting()
    assert fill(cache, examples, count).cached == 4
    assert len(count.seen) == 6
    assert len(FeatureCache(tmp_path / "cache", {})) == 10


def test_a_cache_that_cannot_be_written(tmp_path: Path, pictures: Path) -> None:
    lay(tmp_path, {"file": "in the way"})
    refused(lambda: fill(FeatureCache(tmp_path / "file", {}), read_dataset(pictures)), "file", "cannot be written")


def test_ranks_share_the_work(tmp_path: Path, pictures: Path) -> None:
    examples = read_dataset(pictures)
    caches = [FeatureCache(tmp_path / "cache", {}) for _ in range(3)]
    counts = [Counting() for _ in caches]
    for rank, (cache, count) in enumerate(zip(caches, counts, strict=True)):
        fill(cache, examples, count, rank=rank, world=3)
        assert count.seen == names(examples[rank::3])
    assert len(caches[0]) < 10
    for cache in caches:
        cache.refresh()
        check_features(cache, examples)
    # One rank's share may be all broken; the others have theirs.
    lay(pictures, {"0.png": "words"})
    broken = read_dataset(pictures)[:2]
    assert [name for name, _ in fill(caches[0], broken, rank=0, world=2).skipped] == ["0.png"]


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path: Path, pictures: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def run(order: int) -> None:
        examples = read_dataset(pictures)[::order]
        cache = FeatureCache(tmp_path / "cache", {})
        barrier.wait()
        fill(cache, examples, batch=1, shard=2)
        check_features(cache, examples)

    processes = [context.Process(target=run, args=(order,)) for order in (1, -1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = FeatureCache(tmp_path / "cache", {})
    assert len(cache) == 10
    check_features(cache, read_dataset(pictures))
    assert not list(cache.path.glob(".*.tmp")) and not list(cache.path.glob("*.broken"))


def test_a_cache_that_vanished_is_noticed(tmp_path: Path, pictures: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", {})
    fill(cache, read_dataset(pictures), shard=4, batch=2)
    shard = min(cache.path.glob("features-*"))
    shard.unlink()
    cache.refresh()
    left = len(cache)
    assert left in (4, 6, 8)
    assert fill(cache, read_dataset(pictures)).encoded == 10 - left
    check_features(cache, read_dataset(pictures))


class Features(torch.utils.data.Dataset[Tensor]):
    def __init__(self, cache: FeatureCache, digests: list[str]) -> None:
        self.cache = cache
        self.digests = digests

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, index: int) -> Tensor:
        return self.cache[self.digests[index]]["text/pooled"]


def test_workers_read_the_cache(tmp_path: Path, pictures: Path) -> None:
    examples = read_dataset(pictures)
    cache = FeatureCache(tmp_path / "cache", {})
    fill(cache, examples, shard=3)
    digests = [example.digest() for example in examples]
    cache[digests[0]]
    loader = torch.utils.data.DataLoader(Features(cache, digests), num_workers=2, multiprocessing_context="fork")
    assert torch.cat(list(loader)).flatten().tolist() == [float(number) for number in range(10)]
    # Spawned workers get it pickled, and open the shards themselves.
    sent = pickle.loads(pickle.dumps(cache))
    check_features(sent, examples)


def test_progress_is_shown_when_asked(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = FeatureCache(tmp_path / "cache", {})
    cache.fill(read_dataset(pictures), encode)
    assert "encoding" in capsys.readouterr().err
    cache.fill(read_dataset(pictures), encode)
    assert "encoding" not in capsys.readouterr().err
