"""Workflows as graphs: read, written, and refused with ComfyUI's errors before anything runs."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mahlstick.nodes.graph import InvalidGraph, Kinds, Link, Step, parse, prepare, to_api, validate
from mahlstick.nodes.schema import NodeType, Socket, Widget, node

ModelT = Annotated[Any, Socket("MODEL")]
ImageT = Annotated[Any, Socket("IMAGE")]


@node("test")
def Load(*, name: Annotated[str, Widget(choices=("a", "b"))]) -> ModelT:
    """A model."""


@node("test")
def Sample(
    *,
    model: ModelT,
    steps: Annotated[int, Widget(min=1, max=100)] = 20,
    cfg: Annotated[float, Widget(min=0.0, max=30.0)] = 7.0,
    loop: bool = False,
    text: str = "",
    mask: Annotated[Any, Socket("MASK,IMAGE")] | None = None,
) -> ImageT:
    """A picture."""


def _check(path: str) -> bool | str:
    if path == "raise":
        raise OSError("the disk is gone")
    return True if path.startswith("/") else f"{path} is no path"


@node("test", check=_check)
def Read(*, path: Annotated[str, Widget(choices=("listed",))]) -> ImageT:
    """Its own check replaces that of the choices."""


@node("test")
def Pass(*, value: Annotated[Any, Socket("*")]) -> Annotated[Any, Socket("*")]:
    """Anything."""


@node("test")
def Two(*, a: Annotated[Any, Socket("*")], b: Annotated[Any, Socket("*")]) -> Annotated[Any, Socket("*")]:
    """Of two the one."""


@node("test", is_output=True)
def Save(*, images: ImageT, prefix: str) -> None:
    """An output."""


NODES: dict[str, NodeType] = {each.name: each for each in (Load, Sample, Read, Pass, Two, Save)}
GOOD: dict[str, Any] = {
    "1": {"class_type": "Load", "inputs": {"name": "a"}},
    "2": {"class_type": "Sample", "inputs": {"model": ["1", 0], "steps": 20, "cfg": 7.0, "loop": False, "text": "t"}},
    "3": {"class_type": "Save", "inputs": {"images": ["2", 0], "prefix": "x"}, "_meta": {"title": "Save it"}},
    "4": {"class_type": "Pass", "inputs": {"value": ["2", 0]}},
    "5": {"class_type": "Save", "inputs": {"images": ["4", 0], "prefix": "y"}},
}


def _with(node_id: str, **inputs: Any) -> dict[str, Any]:
    changed = deepcopy(GOOD)
    changed[node_id]["inputs"] |= inputs
    return changed


def _without(node_id: str, name: str) -> dict[str, Any]:
    changed = deepcopy(GOOD)
    del changed[node_id]["inputs"][name]
    return changed


def _reading(path: str) -> dict[str, Any]:
    return GOOD | {"4": {"class_type": "Read", "inputs": {"path": path}}}


def _refusal(prompt: Any, targets: list[str] | None = None) -> InvalidGraph:
    with pytest.raises(InvalidGraph) as caught:
        validate(parse(prompt), NODES, targets)
    json.dumps([caught.value.error, caught.value.node_errors], allow_nan=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


names = st.text("ab1_é", max_size=3)
constants = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names
boxed = st.lists(constants, max_size=3).map(lambda found: {"__value__": found})
links = st.tuples(names, st.integers()).map(list)
nested = st.fixed_dictionaries({"x": constants | boxed, "y": st.lists(links, max_size=2)})
entries = st.fixed_dictionaries(
    {"class_type": names, "inputs": st.dictionaries(names, constants | boxed | links | nested, max_size=4)},
    optional={"_meta": st.fixed_dictionaries({"title": st.text("t", min_size=1)})},
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(names, entries, max_size=4))
def test_a_graph_is_read_and_written_without_loss(prompt: dict[str, Any]) -> None:
    graph = parse(prompt)
    assert to_api(graph) == prompt
    assert parse(json.loads(json.dumps(to_api(graph)))) == graph


def test_what_a_graph_holds() -> None:
    graph = parse(_with("4", more={"__value__": ["2", 0]}, plain={"a": 1}, odd=[1, 2, 3]))
    assert graph["3"] == Step("Save", {"images": Link("2", 0), "prefix": "x"}, "Save it")
    assert graph["4"].inputs == {"value": Link("2", 0), "more": ["2", 0], "plain": {"a": 1}, "odd": [1, 2, 3]}
    again = to_api(graph)["4"]["inputs"]
    assert again["more"] == {"__value__": ["2", 0]} and again["odd"] == [1, 2, 3]
    assert validate(graph, NODES) == ["3", "5"]  # what the node does not know is no fault of its


FAULTS: dict[str, tuple[Any, str, str, str | None]] = {
    "missing": (_without("2", "model"), "required_input_missing", "2", "model"),
    "no such node": (_with("2", model=["9", 0]), "bad_linked_input", "2", "model"),
    "no such output": (_with("3", images=["2", 1]), "bad_linked_input", "3", "images"),
    "negative output": (_with("3", images=["2", -1]), "bad_linked_input", "3", "images"),
    "output number is text": (_with("3", images=["2", "0"]), "bad_linked_input", "3", "images"),
    "a longer list": (_with("3", images=["2", 0, 0]), "bad_linked_input", "3", "images"),
    "another type": (_with("3", images=["1", 0]), "return_type_mismatch", "3", "images"),
    "no number": (_with("2", steps="many"), "invalid_input_type", "2", "steps"),
    "not a number": (_with("2", cfg=float("nan")), "invalid_input_type", "2", "cfg"),
    "infinite": (_with("2", steps=float("inf")), "invalid_input_type", "2", "steps"),
    "null": (_with("2", steps=None), "invalid_input_type", "2", "steps"),
    "thousands of digits": (_with("2", steps=10**9999), "value_bigger_than_max", "2", "steps"),
    "thousands of digits as text": (_with("2", steps="9" * 9999), "invalid_input_type", "2", "steps"),
    "too large a float": (_with("2", cfg=10**999), "invalid_input_type", "2", "cfg"),
    "small": (_with("2", steps=0), "value_smaller_than_min", "2", "steps"),
    "big": (_with("2", cfg="30.5"), "value_bigger_than_max", "2", "cfg"),
    "not in the list": (_with("1", name="c"), "value_not_in_list", "1", "name"),
    "a list for a choice": (_with("1", name={"__value__": ["a"]}), "value_not_in_list", "1", "name"),
    "its own check": (_reading("x"), "custom_validation_failed", "4", "path"),
    "a check that fails": (_reading("raise"), "exception_during_inner_validation", "4", "images"),
    "itself": (_with("4", value=["4", 0]), "dependency_cycle", "4", None),
}


@pytest.mark.parametrize(("prompt", "kind", "node_id", "name"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_reported_as_comfyui_does(prompt: Any, kind: str, node_id: str, name: str | None) -> None:
    refusal = _refusal(prompt)
    assert set(refusal.error) == {"type", "message", "details", "extra_info"}
    assert refusal.error["type"] == "prompt_outputs_failed_validation"
    assert list(refusal.node_errors) == [node_id]
    found = refusal.node_errors[node_id]
    assert set(found) == {"errors", "dependent_outputs", "class_type"}
    (fault,) = found["errors"]
    assert set(fault) == {"type", "message", "details", "extra_info"}
    assert fault["type"] == kind
    assert fault["extra_info"].get("input_name") == name
    assert f"Node {node_id} ({found['class_type']})" in str(refusal)
    assert name is None or name in str(refusal)


def test_what_a_fault_says_of_its_input() -> None:
    (fault,) = _refusal(_with("2", steps="0")).node_errors["2"]["errors"]
    config = ["INT", {"default": 20, "min": 1, "max": 100}]
    assert fault["extra_info"] == {"input_name": "steps", "input_config": config, "received_value": 0}
    (fault,) = _refusal(_with("3", images=["1", 0])).node_errors["3"]["errors"]
    assert fault["extra_info"]["received_type"] == "MODEL" and fault["extra_info"]["linked_node"] == ["1", 0]


def test_all_faults_are_found_and_whose_outputs_they_spoil() -> None:
    broken = _with("2", steps=0, cfg=99)
    broken["4"]["inputs"] = {}
    refusal = _refusal(broken)
    assert {each: one["dependent_outputs"] for each, one in refusal.node_errors.items()} == {"2": ["3"], "4": ["5"]}
    assert str(refusal).endswith("(and 2 more faults).")
    one = _refusal(_with("1", name="c")).node_errors["1"]
    assert one["dependent_outputs"] == ["3", "5"]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (None, "invalid_prompt"),
        ([1, 2], "invalid_prompt"),
        ({3: GOOD["3"]}, "invalid_prompt"),
        ({"3": "Save"}, "invalid_prompt"),
        ({"3": {"class_type": "Save", "inputs": []}}, "invalid_prompt"),
        ({"3": {"inputs": {}}}, "missing_node_type"),
        (GOOD | {"6": {"class_type": "Unheard", "inputs": {}}}, "missing_node_type"),
        ({}, "prompt_no_outputs"),
        ({"1": GOOD["1"]}, "prompt_no_outputs"),
    ],
)
def test_what_is_no_workflow(prompt: Any, kind: str) -> None:
    assert _refusal(prompt).error["type"] == kind


def test_deep_nesting_is_refused_and_lists_in_themselves_too() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    endless: list[Any] = []
    endless += [endless, endless]
    for value in (deep, {"__value__": deep}, {"a": endless}):
        assert _refusal(_with("3", unknown=value)).error["type"] == "invalid_prompt"


def test_cycles_are_named() -> None:
    around = _with("4", value=["6", 0]) | {"6": {"class_type": "Two", "inputs": {"a": ["4", 0], "b": ["4", 0]}}}
    refusal = _refusal(around)
    assert set(refusal.node_errors) == {"4", "6"}
    (fault,) = refusal.node_errors["6"]["errors"]
    assert fault["details"] == "4 (Pass) -> 6 (Two) -> 4 (Pass)"
    assert fault["extra_info"] == {"node_id": "6", "cycle_nodes": ["4", "6"]}
    assert validate(parse(around), NODES, ["3"]) == ["3"]


def test_values_are_converted_in_a_copy() -> None:
    graph = parse(_with("2", steps="5", cfg=3, loop=1, text=12, unknown=["3", 0]))
    before = deepcopy(graph)
    prepared, outputs = prepare(graph, Kinds(NODES))
    assert outputs == ["3", "5"] and graph == before
    found = prepared["2"].inputs
    assert found == {"model": Link("1", 0), "steps": 5, "cfg": 3.0, "loop": True, "text": "12"}
    assert [type(found[name]) for name in ("steps", "cfg", "loop", "text")] == [int, float, bool, str]


def test_types_match_where_they_meet() -> None:
    assert validate(parse(_with("2", mask=["4", 0])), NODES, ["1"]) == ["1"]
    loop = _with("2", mask=["6", 0]) | {"6": {"class_type": "Read", "inputs": {"path": "/x"}}}
    assert validate(parse(loop), NODES) == ["3", "5"]  # IMAGE into MASK,IMAGE, and IMAGE through *
    assert _refusal(_with("2", mask=["1", 0])).node_errors["2"]["errors"][0]["type"] == "return_type_mismatch"


def test_some_nodes_may_be_run_alone() -> None:
    broken = _with("5", images=["1", 0])
    assert validate(parse(broken), NODES, ["2", "3"]) == ["2", "3"]
    assert _refusal(GOOD, ["3", "77"]).error["details"] == "no node 77"
    assert _refusal(broken).node_errors["5"]["dependent_outputs"] == ["5"]


def test_long_and_large_graphs() -> None:
    chain = {"1": GOOD["1"], "2": GOOD["2"], "n0": {"class_type": "Pass", "inputs": {"value": ["2", 0]}}}
    chain |= {f"n{i}": {"class_type": "Pass", "inputs": {"value": [f"n{i - 1}", 0]}} for i in range(1, 10_000)}
    assert validate(parse(chain), NODES, ["n9999"]) == ["n9999"]
    ring = chain | {"n0": {"class_type": "Pass", "inputs": {"value": ["n9999", 0]}}}
    assert len(str(_refusal(ring, ["n9999"]))) < 1000
    wide: dict[str, Any] = {"1": GOOD["1"]}
    for i in range(500):
        wide[f"s{i}"] = {
            "class_type": "Sample",
            "inputs": {"model": ["1", 0], "steps": 5, "cfg": 1.0, "loop": 0, "text": ""},
        }
        wide[f"o{i}"] = {"class_type": "Save", "inputs": {"images": [f"s{i}", 0], "prefix": "x"}}
    began = time.perf_counter()
    validate(parse(wide), NODES)
    assert time.perf_counter() - began < 0.5
