"""Workflows run: what runs and what does not, in which order, and what is told of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mahlstick.nodes.cache import DiskCache, MemoryCache, Tiered
from mahlstick.nodes.engine import Engine, NodeFailed, Outcome
from mahlstick.nodes.graph import InvalidGraph, Link, LiveGraph, Step
from mahlstick.nodes.progress import Interrupted, report
from mahlstick.nodes.schema import Blocked, Hidden, Input, NodeType, Returned, Socket, Widget, node

AnyT = Annotated[Any, Socket("*")]
NumberT = Annotated[Any, Socket("NUMBER")]
LazyT = Annotated[Any, Socket("NUMBER", lazy=True)]

calls: Counter[str] = Counter()
hooks: dict[str, Callable[[], None]] = {}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    calls.clear()
    yield
    hooks.clear()


@node("test")
def Number(*, value: Annotated[int, Widget(min=-99, max=99)] = 0) -> NumberT:
    calls[f"Number {value}"] += 1
    return value


@node("test")
def Add(*, a: NumberT, b: NumberT | None = None, more: int = 0) -> NumberT:
    calls["Add"] += 1
    return a + (b or 0) + more


@node("test", is_output=True)
def Show(*, value: NumberT) -> Returned:
    calls["Show"] += 1
    return Returned(ui={"shown": [value]})


def _branch(choose: bool, yes: Any, no: Any) -> list[str]:
    return [name for name, value in (("yes", yes), ("no", no)) if (name == "yes") is choose and value is None]


@node("test", needs=_branch)
def Choose(*, choose: bool, yes: LazyT, no: LazyT) -> NumberT:
    return yes if choose else no


@node("test", lists=(True,))
def Count(*, upto: int) -> NumberT:
    return list(range(upto))


@node("test", takes_lists=True)
def Sum(*, values: NumberT, scale: int = 1) -> NumberT:
    return sum(values) * scale[0]  # type: ignore[index]


@node("test")
def Stop(*, value: NumberT, at: int, message: str = "") -> tuple[NumberT, NumberT]:
    return Blocked(message or None) if value == at else (value, -value)  # type: ignore[return-value]


@node("test", fingerprint=lambda path: float("nan") if path == "nan" else os.path.getmtime(path))
def Read(*, path: str) -> NumberT:
    calls["Read"] += 1
    return 1 if path == "nan" else int(Path(path).read_text())


@node("test")
def Fail(*, value: NumberT) -> NumberT:
    raise ZeroDivisionError(f"cannot divide {value}")


@node("test")
def Leave(*, value: NumberT) -> NumberT:
    hooks["leave"]()
    return value


@node("test")
async def Meet(*, value: NumberT, group: str = "x") -> NumberT:
    """Waits until two are here."""
    calls[group] += 1
    while calls[group] < 2:
        await asyncio.sleep(0)
    return value


@node("test")
async def Sleep(*, value: NumberT) -> NumberT:
    hooks["asleep"]()
    await asyncio.sleep(60)
    return value


@node("test")
def Long(*, steps: int) -> NumberT:
    for step in range(steps):
        hooks.get(f"step {step}", int)()
        report(step + 1, steps, preview="picture" if step == 0 else None)
    hooks.get("end", int)()
    return steps


@node("test")
def Loop(*, value: NumberT, times: int) -> NumberT:
    """Adds one for each of its times, and shows what it adds, by expanding into itself."""
    calls["Loop"] += 1
    if not 0 < times < 100:  # a fuzzed number
        return value
    inner = {
        "add": {"class_type": "Add", "inputs": {"a": value, "more": 1}},
        "show": {"class_type": "Show", "inputs": {"value": ["add", 0]}},
        "again": {"class_type": "Loop", "inputs": {"value": ["add", 0], "times": times - 1}},
    }
    return Returned((["again", 0],), expand=inner)


@node("test")
def Expand(*, value: NumberT, graph: AnyT, outputs: AnyT) -> NumberT:
    return Returned(tuple(outputs), expand=graph)


@node("test")
def Turn(*, value: NumberT) -> NumberT:
    """Expands with an object that is no plain data."""
    return Returned((["n", 0],), expand={"n": {"class_type": "Add", "inputs": {"a": complex(value, 1)}}})


@node("test", is_output=True)
def Hear(
    *,
    value: NumberT,
    prompt: Annotated[Any, Hidden("PROMPT")] = None,
    extra: Annotated[Any, Hidden("EXTRA_PNGINFO")] = None,
    here: Annotated[str, Hidden("UNIQUE_ID")] = "",
    graph: Annotated[LiveGraph | None, Hidden("DYNPROMPT")] = None,
) -> Returned:
    assert graph is not None
    owners = graph.get_parent_node_id(here), graph.get_real_node_id(here), graph.get_display_node_id(here)
    return Returned(ui={"heard": [prompt, extra, here, graph.get_node(here)["class_type"], *owners]})


@dataclass(frozen=True, eq=False)
class Pack(NodeType):
    """A node of ComfyUI's own kind, some of whose inputs are the links themselves."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(replace(each, options={"rawLink": True}) for each in super().inputs)


def _raw(*, value: NumberT) -> NumberT:
    return value


Raw = Pack("Raw", _raw)


NODES: dict[str, NodeType] = {each.name: each for each in globals().values() if isinstance(each, NodeType)}


def _graph(**steps: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in steps.items()}


def _values(outcome: Outcome, each: str) -> list[Any]:
    if outcome.error:
        raise outcome.error
    return outcome.outputs[each][0]


def _run(graph: Mapping[str, Any], *targets: str) -> Outcome:
    return Engine(NODES).run(graph, targets or None)


DIAMOND = _graph(
    one=("Number", {"value": 1}),
    two=("Number", {"value": 2}),
    left=("Add", {"a": ["one", 0], "more": 10}),
    right=("Add", {"a": ["one", 0], "b": ["two", 0], "more": 0}),
    sum=("Add", {"a": ["left", 0], "b": ["right", 0], "more": 0}),
    show=("Show", {"value": ["sum", 0]}),
    unused=("Number", {"value": 9}),
)


def test_what_is_needed_runs_once_and_nothing_else() -> None:
    outcome = _run(DIAMOND)
    assert outcome.ui == {"show": {"shown": [14]}} and outcome.error is None and outcome.cached == []
    assert sorted(outcome.executed) == ["left", "one", "right", "show", "sum", "two"]
    assert outcome.executed[-2:] == ["sum", "show"]
    assert calls["Number 1"] == 1
    only = _run(DIAMOND, "right", "two")
    assert only.executed == ["one", "two", "right"] and only.outputs == {"right": ([3],), "two": ([2],)}


def test_a_graph_of_steps_runs_too() -> None:
    graph = {"a": Step("Number", {"value": "7"}), "b": Step("Add", {"a": Link("a", 0), "more": 1})}
    assert _values(_run(graph, "b"), "b") == [8]


def test_a_second_run_executes_nothing_and_an_edit_what_depends_on_it() -> None:
    engine = Engine(NODES, MemoryCache(10_000))
    first, second = engine.run(DIAMOND), engine.run(DIAMOND)
    assert second.executed == [] and sorted(second.cached) == sorted(first.executed) and second.ui == first.ui
    edited = deepcopy(DIAMOND)
    edited["two"]["inputs"]["value"] = 5
    third = engine.run(edited)
    assert sorted(third.executed) == ["right", "show", "sum", "two"] and third.cached == ["left", "one"]
    renamed = {f"x{name}": value for name, value in deepcopy(DIAMOND).items()}
    for each in renamed.values():
        each["inputs"] = {k: [f"x{v[0]}", 0] if isinstance(v, list) else v for k, v in each["inputs"].items()}
    assert engine.run(renamed).executed == []  # by content, so whatever its name


def test_a_new_process_executes_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.test_engine import *\n"
        "print(len(Engine(NODES, DiskCache(sys.argv[1], 1 << 20)).run(DIAMOND).executed))"
    )
    found = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert found.stdout == "6\n"
    outcome = Engine(NODES, DiskCache(tmp_path, 1 << 20)).run(DIAMOND)
    assert outcome.executed == [] and outcome.ui == {"show": {"shown": [14]}}


def test_what_was_shown_must_still_be_there(tmp_path: Path) -> None:
    there = True
    cache = Tiered(MemoryCache(10_000), DiskCache(tmp_path, 1 << 20))
    engine = Engine(NODES, cache, stamp=lambda ui: f"{ui} {there}")
    engine.run(DIAMOND)
    assert engine.run(DIAMOND).executed == []
    cache.free()
    assert engine.run(DIAMOND).executed == []
    there = False
    assert engine.run(DIAMOND).executed == ["show"] and engine.run(DIAMOND).executed == []


def test_fingerprints(tmp_path: Path) -> None:
    engine, path = Engine(NODES, MemoryCache(10_000)), tmp_path / "x"
    path.write_text("5")
    graph = _graph(read=("Read", {"path": str(path)}), show=("Show", {"value": ["read", 0]}))
    assert engine.run(graph).executed == ["read", "show"] and engine.run(graph).executed == []
    path.write_text("6")
    os.utime(path, (1, 1))
    assert engine.run(graph).ui == {"show": {"shown": [6]}} and calls["Read"] == 2
    never = _graph(read=("Read", {"path": "nan"}), show=("Show", {"value": ["read", 0]}))
    assert [engine.run(never).executed for _ in range(2)] == [["read", "show"]] * 2
    path.unlink()
    assert "No such file" in str(engine.run(graph).error)


def test_nodes_that_make_the_same_run_once() -> None:
    graph = _graph(
        a=("Number", {"value": 3}), b=("Number", {"value": 3}),
        x=("Show", {"value": ["a", 0]}), y=("Show", {"value": ["b", 0]}),
    )  # fmt: skip
    outcome = _run(graph)
    assert outcome.executed == ["a", "x"] and outcome.cached == ["y"]
    assert outcome.ui == {"x": {"shown": [3]}, "y": {"shown": [3]}}


def test_lazy_inputs_run_only_where_asked_for() -> None:
    graph = _graph(
        yes=("Number", {"value": 1}),
        no=("Fail", {"value": ["yes", 0]}),
        choose=("Choose", {"choose": True, "yes": ["yes", 0], "no": ["no", 0]}),
        show=("Show", {"value": ["choose", 0]}),
    )
    assert _run(graph).executed == ["yes", "choose", "show"]
    graph["choose"]["inputs"]["choose"] = False
    error = _run(graph).error
    assert isinstance(error, NodeFailed) and error.node_id == "no"


def test_lists_are_mapped_over() -> None:
    graph = _graph(
        three=("Count", {"upto": 3}), two=("Count", {"upto": 2}), none=("Count", {"upto": 0}),
        add=("Add", {"a": ["three", 0], "b": ["two", 0], "more": 10}),
        sum=("Sum", {"values": ["add", 0], "scale": 2}),
        show=("Show", {"value": ["add", 0]}),
        nothing=("Add", {"a": ["three", 0], "b": ["none", 0], "more": 0}),
        zero=("Sum", {"values": ["nothing", 0], "scale": 2}),
    )  # fmt: skip
    outcome = _run(graph, "add", "sum", "show", "nothing", "zero")
    assert _values(outcome, "add") == [10, 12, 13]  # the shorter list repeats its last
    assert _values(outcome, "sum") == [70] and outcome.ui == {"show": {"shown": [10, 12, 13]}}
    assert _values(outcome, "nothing") == [] and _values(outcome, "zero") == [0]


def _blocking(message: str) -> dict[str, Any]:
    return _graph(
        count=("Count", {"upto": 3}),
        stop=("Stop", {"value": ["count", 0], "at": 1, "message": message}),
        add=("Add", {"a": ["stop", 1], "more": 0}),
        show=("Show", {"value": ["add", 0]}),
        sum=("Sum", {"values": ["stop", 0], "scale": 1}),
        after=("Show", {"value": ["sum", 0]}),
        other=("Show", {"value": ["count", 0]}),
    )


def test_a_silent_block_keeps_what_is_behind_it_from_running() -> None:
    engine = Engine(NODES, MemoryCache(10_000))
    outcome = engine.run(_blocking(""))
    assert outcome.error is None and outcome.ui == {"show": {"shown": [0, -2]}, "other": {"shown": [0, 1, 2]}}
    assert "sum" not in outcome.executed and "after" not in outcome.executed
    assert engine.run(_blocking("")).executed == []


def test_a_block_with_a_message_is_an_error_each_time_and_the_rest_runs() -> None:
    engine = Engine(NODES, MemoryCache(10_000))
    heard: list[tuple[str, Any]] = []
    for _ in range(2):
        heard.clear()
        outcome = engine.run(_blocking("not today"), listen=lambda *event: heard.append(event))
        assert outcome.ui["other"] == {"shown": [0, 1, 2]} and outcome.ui["show"] == {"shown": [0, -2]}
        assert isinstance(outcome.error, NodeFailed) and "not today" in str(outcome.error)
        errors = [data for event, data in heard if event == "execution_error"]
        assert {data["node_id"] for data in errors} == {"add", "sum"}
        assert {data["exception_type"] for data in errors} == {"ExecutionBlocked"}
        assert "execution_success" not in dict(heard)


def test_a_loop_of_nodes_that_expand_into_themselves() -> None:
    graph = _graph(
        zero=("Number", {"value": 0}),
        loop=("Loop", {"value": ["zero", 0], "times": 50}),
        show=("Show", {"value": ["loop", 0]}),
    )
    engine = Engine(NODES, MemoryCache(100_000))
    heard: list[tuple[str, Any]] = []
    outcome = engine.run(graph, listen=lambda *event: heard.append(event))
    assert outcome.ui["show"] == {"shown": [50]} and calls["Loop"] == 51 and len(outcome.ui) == 51
    assert len(set(outcome.executed)) == len(outcome.executed) == 1 + 51 + 2 * 50 + 1
    inner = [data for event, data in heard if event == "executed" and data["node"] != "show"]
    assert [data["output"]["shown"] for data in inner] == [[index] for index in range(1, 51)]
    assert {data["display_node"] for data in inner} == {"loop"}
    again = engine.run(graph, ["loop", "show"])
    assert again.executed == [] and again.ui == outcome.ui  # what it showed comes back with its result
    graph["loop"]["inputs"]["times"] = 51
    longer = engine.run(graph)
    assert calls["Loop"] == 51 + 52 and longer.ui["show"] == {"shown": [51]}


def test_objects_in_expansions_are_told_apart_by_where_they_came_from() -> None:
    graph = _graph(
        a=("Number", {"value": 1}), b=("Number", {"value": 2}), c=("Number", {"value": 1}),
        x=("Turn", {"value": ["a", 0]}), y=("Turn", {"value": ["b", 0]}), z=("Turn", {"value": ["c", 0]}),
    )  # fmt: skip
    engine = Engine(NODES, MemoryCache(1000))
    outcome = engine.run(graph, ["x", "y", "z"])
    assert [_values(outcome, each) for each in "xyz"] == [[1 + 1j], [2 + 1j], [1 + 1j]] and calls["Add"] == 2
    assert engine.run(graph, ["x", "y", "z"]).executed == []


def test_what_an_expansion_makes_is_cached_by_content() -> None:
    """Another outer node, the same inside."""
    graph = _graph(
        one=("Number", {"value": 1}),
        out=("Expand", {"value": ["one", 0], "graph": {"n": {"class_type": "Number", "inputs": {"value": 8}}}}),
    )
    engine = Engine(NODES, MemoryCache(10_000))
    graph["out"]["inputs"]["outputs"] = {"__value__": [["n", 0]]}
    assert _values(engine.run(graph, ["out"]), "out") == [8]
    graph["one"]["inputs"]["value"] = 2
    assert engine.run(graph, ["out"]).executed == ["one", "out"] and calls["Number 8"] == 1


@pytest.mark.parametrize(
    ("inner", "outputs", "says"),
    [
        ({"n": {"class_type": "Unheard", "inputs": {}}}, [["n", 0]], "Unheard"),
        ({"n": {"class_type": "Add", "inputs": {"a": ["nowhere", 0]}}}, [["n", 0]], "nowhere"),
        ({"n": {"class_type": "Add", "inputs": {"a": ["out", 0]}}}, [["n", 0]], "wait for each other"),
        ({"n": {"class_type": "Add", "inputs": {"a": ["n", 0]}}}, [["n", 0]], "wait for each other"),
        ({"n": {"class_type": "Number", "inputs": {"value": 1}}}, [["n", 4]], "no number 4"),
        ({"n": {"inputs": {}}}, [["n", 0]], "class_type"),
    ],
)
def test_an_expansion_that_cannot_run_is_an_error(inner: Any, outputs: Any, says: str) -> None:
    graph = _graph(
        one=("Number", {"value": 1}),
        out=("Expand", {"value": ["one", 0], "graph": inner, "outputs": {"__value__": outputs}}),
    )
    error = _run(graph, "out").error
    assert isinstance(error, NodeFailed) and error.node_id == "out" and says in str(error)


def test_async_nodes_run_side_by_side() -> None:
    graph = _graph(
        one=("Number", {"value": 1}),
        two=("Count", {"upto": 2}),
        a=("Meet", {"value": ["one", 0], "group": "x"}),
        b=("Meet", {"value": ["a-copy", 0], "group": "x"}),
        lists=("Meet", {"value": ["two", 0], "group": "y"}),
    )
    graph["a-copy"] = graph["two"]
    outcome = _run(graph, "a", "b", "lists")
    assert _values(outcome, "a") == [1] and _values(outcome, "b") == [0, 1] == _values(outcome, "lists")


def test_a_run_within_a_running_loop() -> None:
    async def notebook() -> Outcome:
        return _run(DIAMOND)

    async def server() -> Outcome:
        return await Engine(NODES).run_async(DIAMOND)

    assert asyncio.run(notebook()).ui == asyncio.run(server()).ui == {"show": {"shown": [14]}}


def test_a_failure_says_where_and_why() -> None:
    graph = _graph(
        one=("Number", {"value": 1}),
        fail=("Fail", {"value": ["one", 0]}),
        show=("Show", {"value": ["fail", 0]}),
    )
    heard: list[tuple[str, Any]] = []
    outcome = Engine(NODES).run(graph, listen=lambda *event: heard.append(event))
    assert str(outcome.error) == "Node fail (Fail): cannot divide 1" and outcome.outputs == {}
    event, data = heard[-1]
    assert event == "execution_error" and "traceback" in data and data.pop("traceback")[-1].count("ZeroDivisionError")
    assert data == {
        "node_id": "fail",
        "node_type": "Fail",
        "executed": ["one"],
        "exception_message": "cannot divide 1",
        "exception_type": "ZeroDivisionError",
        "current_inputs": {"value": [1]},
        "current_outputs": ["one"],
    }


@pytest.mark.parametrize("kind", ["Leave", "Sleep"])
def test_a_node_cannot_end_the_process(kind: str) -> None:
    """Side by side with others, or not."""

    def leave() -> None:
        raise SystemExit(2)

    hooks["asleep"] = hooks["leave"] = leave
    outcome = _run(_graph(one=("Number", {"value": 1}), end=(kind, {"value": ["one", 0]})), "end")
    assert str(outcome.error) == f"Node end ({kind}): It tried to end the program (2)."


def test_a_failure_ends_what_runs_beside_it() -> None:
    graph = _graph(
        one=("Number", {"value": 1}),
        sleep=("Sleep", {"value": ["one", 0]}),
        fail=("Fail", {"value": ["one", 0]}),
        sum=("Add", {"a": ["sleep", 0], "b": ["fail", 0], "more": 0}),
    )
    hooks["asleep"] = lambda: None
    assert str(_run(graph, "sum").error) == "Node fail (Fail): cannot divide 1"


def test_events_and_their_order() -> None:
    graph = _graph(
        long=("Long", {"steps": 2}),
        show=("Show", {"value": ["long", 0]}),
    )
    engine = Engine(NODES, MemoryCache(1000))
    heard: list[Any] = []
    engine.run(graph, listen=lambda *event: heard.append(event))
    assert heard == [
        ("execution_start", {}),
        ("execution_cached", {"nodes": []}),
        ("executing", {"node": "long", "display_node": "long"}),
        ("progress", {"value": 1, "max": 2, "node": "long"}),
        ("preview", {"image": "picture", "node": "long", "display_node": "long"}),
        ("progress", {"value": 2, "max": 2, "node": "long"}),
        ("executing", {"node": "show", "display_node": "show"}),
        ("executed", {"node": "show", "display_node": "show", "output": {"shown": [2]}}),
        ("execution_success", {}),
    ]
    heard.clear()
    engine.run(graph, listen=lambda *event: heard.append(event))
    assert heard == [
        ("execution_start", {}),
        ("execution_cached", {"nodes": ["show", "long"]}),
        ("executed", {"node": "show", "display_node": "show", "output": {"shown": [2]}}),
        ("execution_success", {}),
    ]


@pytest.mark.parametrize(
    ("when", "at"), [("before", "long"), ("step 1", "long"), ("end", "sleep"), ("asleep", "sleep")]
)
def test_a_run_can_be_stopped(when: str, at: str) -> None:
    graph = _graph(
        long=("Long", {"steps": 3}),
        sleep=("Sleep", {"value": ["long", 0]}),
        show=("Show", {"value": ["sleep", 0]}),
    )
    stop, heard = threading.Event(), []
    hooks["asleep"] = threading.Timer(0.1, stop.set).start if when == "asleep" else pytest.fail
    hooks[when] = hooks.get(when, stop.set)
    if when == "before":
        stop.set()
    outcome = Engine(NODES).run(graph, listen=lambda *event: heard.append(event), stop=stop)
    event, data = heard[-1]
    assert isinstance(outcome.error, Interrupted) and event == "execution_interrupted"
    executed = ["long"] if at == "sleep" else []
    assert data == {"node_id": at, "node_type": at.title(), "executed": executed} and outcome.executed == executed


def test_hidden_inputs() -> None:
    inner = {"h": {"class_type": "Hear", "inputs": {"value": ["one", 0]}}}
    graph = _graph(
        one=("Number", {"value": 1}),
        hear=("Hear", {"value": ["one", 0]}),
        out=("Expand", {"value": ["one", 0], "graph": inner, "outputs": {"__value__": [5]}}),
    )
    extra = {"workflow": {"nodes": []}}
    outcome = Engine(NODES).run(graph, ["hear", "out"], extra_pnginfo=extra)
    assert outcome.ui["hear"]["heard"] == [graph, extra, "hear", "Hear", None, "hear", "hear"]
    assert outcome.ui["out.0.h"]["heard"] == [graph, extra, "out.0.h", "Hear", "out", "out", "out"]
    assert _values(outcome, "out") == [5]


def test_a_node_may_ask_for_the_links_themselves() -> None:
    graph = _graph(one=("Number", {"value": 1}), raw=("Raw", {"value": ["one", 0]}))
    outcome = _run(graph, "raw")
    assert _values(outcome, "raw") == [["one", 0]] and outcome.executed == ["one", "raw"]


def test_long_chains_and_wide_graphs() -> None:
    chain = _graph(n0=("Number", {"value": 1})) | _graph(
        **{f"n{i}": ("Add", {"a": [f"n{i - 1}", 0], "more": 1}) for i in range(1, 3000)}
    )
    assert _values(_run(chain, "n2999"), "n2999") == [3000]
    wide = _graph(n=("Number", {"value": 1})) | _graph(
        **{f"s{i}": ("Add", {"a": ["n", 0], "more": i}) for i in range(500)}
    )
    assert len(_run(wide, *list(wide)[1:]).executed) == 501


WORKFLOW = DIAMOND | _graph(
    choose=("Choose", {"choose": True, "yes": ["left", 0], "no": ["right", 0]}),
    count=("Count", {"upto": 3}),
    total=("Sum", {"values": ["count", 0], "scale": 1}),
    loop=("Loop", {"value": ["choose", 0], "times": 2}),
    both=("Add", {"a": ["loop", 0], "b": ["total", 0], "more": 0}),
    end=("Show", {"value": ["both", 0]}),
)
_ODD = [None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "", "9" * 5000, "two", {}, {"__value__": [1]}]
_ODD += [
    [],
    ["one"],
    ["one", 0, 0],
    ["none", 0],
    ["one", 7],
    ["one", "0"],
    [["one"], 0],
    {"__value__": {"__value__": 1}},
]
_names = st.sampled_from(sorted(WORKFLOW))


@st.composite
def _broken(draw: Any) -> Any:
    """A workflow with something taken away, put in another's place, or bent around."""
    graph = deepcopy(WORKFLOW)
    for _ in range(draw(st.integers(1, 4))):
        each = draw(_names)
        kind = draw(st.sampled_from(["node", "input", "value", "link", "class", "entry", "deep"]))
        inputs = graph.get(each, {}).get("inputs") if isinstance(graph.get(each), dict) else None
        if kind == "node":
            graph.pop(each, None)
        elif kind == "entry":
            graph[draw(_names)] = draw(st.sampled_from([None, 3, [], {}, {"class_type": 3}, {"class_type": "Show"}]))
        elif not isinstance(inputs, dict) or not inputs:
            continue
        elif kind == "class":
            graph[each]["class_type"] = draw(st.sampled_from([*NODES, "", "None", 5, None, []]))
        else:
            name = draw(st.sampled_from(sorted(inputs)))
            deep: Any = 0
            for _ in range(draw(st.sampled_from([3, 70, 5000])) if kind == "deep" else 0):
                deep = {"x": [deep]}
            link = [draw(_names), draw(st.integers(-1, 1))]
            inputs[name] = {"value": draw(st.sampled_from(_ODD)), "link": link, "deep": deep}.get(kind)
            if kind == "input":
                del inputs[name]
    return graph


@settings(max_examples=150, deadline=None)
@given(_broken())
def test_whatever_the_graph_it_runs_or_is_refused_before_it_runs(graph: Any) -> None:
    hooks["asleep"] = lambda: None
    calls.clear()
    heard: list[str] = []
    try:
        outcome = Engine({name: one for name, one in NODES.items() if name not in ("Sleep", "Meet")}).run(
            graph, listen=lambda event, data: heard.append(event)
        )
    except InvalidGraph as error:
        assert not calls and not heard
        assert error.error["type"] and "\n" not in str(error)
    else:
        assert heard[-1] in ("execution_success", "execution_error")
        assert (outcome.error is None) == (heard[-1] == "execution_success")
