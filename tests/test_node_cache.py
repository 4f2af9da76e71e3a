"""Results kept by content: what their keys tell apart, their bounds, and what a crash leaves."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from mahlstick.nodes.cache import Cache, DiskCache, Entry, MemoryCache, Tiered, canonical, key
from mahlstick.nodes.schema import Blocked, NodeType, Socket, node


@node("test")
def Give(*, value: int = 0) -> Annotated[Any, Socket("*")]:
    return value


@node("test")
def Other(*, value: int = 0) -> Annotated[Any, Socket("*")]:
    return value


def _key(
    kind: NodeType = Give, value: Any = 1, upstream: str | None = "k", slot: int = 0, print_: Any = 0
) -> str | None:
    return key(kind, {"value": canonical(value)}, {"a": (upstream, slot)}, canonical(print_))


def test_a_key_tells_apart_all_that_a_result_depends_on() -> None:
    different = [_key(), _key(Other), _key(value=2), _key(value=1.0), _key(value="1"), _key(value=True), _key(slot=1)]
    different += [_key(upstream="l"), _key(print_=1), _key(value=[1]), _key(value={"b": 1}), _key(value=b"1")]
    assert len(set(different)) == len(different) and None not in different
    assert _key(value={"a": 1, "b": 2}) == _key(value={"b": 2, "a": 1})


def test_what_equals_nothing_has_no_key() -> None:
    assert _key(print_=float("nan")) is None and _key(print_=[1, float("nan")]) is None
    assert _key(value=object()) is None and _key(upstream=None) is None


@dataclass(frozen=True)
class Held:
    net: Any
    name: str = "x"


def test_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    cache = MemoryCache(1000)
    for name in "abc":
        cache.put(name, Entry(([torch.zeros(75)],)))  # 300 bytes
    assert cache.get("a") is not None
    cache.put("d", Entry(([{"samples": [torch.zeros(75)]}],)))
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"] and cache.size == 900
    cache.put("huge", Entry(([torch.zeros(300)],)))
    assert cache.get("huge") is None and cache.size == 900
    cache.free()
    assert cache.size == 0 and cache.get("a") is None


def test_what_entries_share_counts_once() -> None:
    cache = MemoryCache(1000)
    net = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    for name in "abc":
        cache.put(name, Entry(([Held(net), Held(net)],)))
    assert cache.size == 400 + 1  # and one letter
    cache.put("a", Entry(([1],)))
    cache.put("b", Entry(([1],)))
    assert cache.size == 401 and cache.get("c")
    cache.put("c", Entry())
    assert cache.size == 0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _rich() -> Entry:
    base = torch.arange(12.0).reshape(3, 4)
    kinds = [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = [base, base.T, base[1], base[:0], torch.tensor(3.5), *(base.to(kind) for kind in kinds)]
    plain = [None, True, 3, 10**30, -0.5, float("inf"), "é\ud800", ("t", [1, ()]), {}, {1: 2, "a": (base,), None: []}]
    return Entry((tensors, plain, [Blocked(), Blocked("why")], []), {"": {"images": [{"filename": "a.png"}]}})


def test_the_disk_gives_back_what_it_got(tmp_path: Path) -> None:
    entry = _rich()
    DiskCache(tmp_path, 1 << 20).put("k", entry)
    found = DiskCache(tmp_path, 1 << 20).get("k")
    assert found is not None and _same(entry.outputs, found.outputs) and found.shown == entry.shown
    assert [path.name for path in tmp_path.iterdir()] == ["k.safetensors"]


@pytest.mark.parametrize(
    "value", [object(), torch.nn.Linear(1, 1), torch.nn.Parameter(torch.zeros(1)), torch.zeros(1).to_sparse(), {1}]
)
def test_what_cannot_be_stored_is_left_out(tmp_path: Path, value: Any) -> None:
    cache = DiskCache(tmp_path, 1 << 20)
    cache.put("k", Entry(([[1, value]],)))
    assert cache.get("k") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.99])
def test_a_damaged_file_counts_as_none_and_is_removed(tmp_path: Path, share: float) -> None:
    cache, path = DiskCache(tmp_path, 1 << 20), tmp_path / "k.safetensors"
    for damage in ("truncated", "changed", "zeros"):
        cache.put("k", _rich())
        data = path.read_bytes()
        at = int(share * len(data))
        broken = {
            "truncated": data[:at],
            "changed": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
            "zeros": data[:at] + bytes(len(data) - at),
        }
        path.write_bytes(broken[damage])
        found = cache.get("k")
        if found is None:
            assert not path.exists()
        else:  # a letter of the header that says nothing, such as a space
            assert damage == "changed" and _same(found.outputs, _rich().outputs)


def test_the_folder_is_bounded_and_forgets_the_least_recently_used(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for index in range(20):
        cache.put(f"k{index}", Entry(([torch.zeros(250)],)))  # 1,000 bytes and the header
        cache.get("k0")
        os.utime(tmp_path / "k0.safetensors", (time.time() + 9, time.time() + 9))  # clocks of files may be coarse
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000
    assert cache.get("k0") and cache.get("k19") and cache.get("k1") is None
    cache.put("huge", Entry(([torch.zeros(2500)],)))
    assert cache.get("huge") is None and cache.get("k19")


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = DiskCache(tmp_path / "file", 1000)
    cache.put("k", Entry(([1],)))
    assert cache.get("k") is None


def _write_for_ever(folder: Path) -> None:
    cache = DiskCache(folder, 1 << 26)
    while True:
        for name in range(8):
            cache.put(f"k{name}", Entry(([torch.full((200_000,), float(name))],)))


def test_processes_killed_while_writing_leave_nothing_broken(tmp_path: Path) -> None:
    writers = [get_context("fork").Process(target=_write_for_ever, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    cache, found = DiskCache(tmp_path, 1 << 26), 0
    until = time.monotonic() + 1
    while time.monotonic() < until or not found:
        found += _intact(cache)
    for writer in writers:
        writer.kill()
        writer.join()
    assert _intact(cache)


def test_what_killed_processes_left_is_cleared_away(tmp_path: Path) -> None:
    left, under_way = tmp_path / ".left.tmp", tmp_path / ".under-way.tmp"
    for path in (left, under_way):
        path.touch()
    os.utime(left, (0, 0))
    DiskCache(tmp_path, 1 << 20).put("k", Entry(([1],)))
    assert not left.exists() and under_way.exists()


def _intact(cache: DiskCache) -> int:
    """How many of the writers' entries are there; each must be whole."""
    before = set(cache.folder.glob("k*.safetensors"))
    entries = {name: cache.get(f"k{name}") for name in range(8)}
    assert before <= set(cache.folder.glob("k*.safetensors"))  # none was taken for damaged
    for name, entry in entries.items():
        assert entry is None or torch.equal(entry.outputs[0][0], torch.full((200_000,), float(name)))
    return sum(entry is not None for entry in entries.values())


def test_memory_stands_before_the_disk(tmp_path: Path) -> None:
    memory, disk = MemoryCache(1000), DiskCache(tmp_path, 1 << 20)
    both: Cache = Tiered(memory, disk)
    model = object()
    both.put("net", Entry(([model],)))
    both.put("k", Entry(([torch.ones(3)],)))
    assert disk.get("net") is None and memory.get("net") is both.get("net")
    fresh = MemoryCache(1000)
    assert Tiered(fresh, disk).get("k") is fresh.get("k") is not None
    Tiered(memory, disk).free()
    assert memory.get("k") is None and disk.get("k") is not None
