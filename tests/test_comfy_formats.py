"""ComfyUI's formats: what its page saves means what it would send, and each form goes to each other and back."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mahlstick.nodes
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.builtin import all_nodes
from mahlstick.nodes.comfy.script import Workflow, from_python, to_python
from mahlstick.nodes.comfy.ui import from_api, read, to_api
from mahlstick.nodes.graph import parse, validate
from mahlstick.nodes.schema import NodeType, Socket, Widget, node

ASSETS = Path(__file__).parent.parent / "assets"

Model = Annotated[Any, Socket("MODEL")]
Clip = Annotated[Any, Socket("CLIP")]
Vae = Annotated[Any, Socket("VAE")]
Conditioning = Annotated[Any, Socket("CONDITIONING")]
Latent = Annotated[Any, Socket("LATENT")]
Picture = Annotated[Any, Socket("IMAGE")]
Anything = Annotated[Any, Socket("*")]
Text = Annotated[str, Widget(multiline=True)]


@node("stub")
def Load(*, name: Literal["a.ckpt", "b.ckpt"]) -> tuple[Model, Clip, Vae]: ...


@node("stub", display_name="Encode Text")
def Encode(*, clip: Clip, text: Text) -> Conditioning: ...


@node("stub")
def Lora(*, model: Model, clip: Clip, file: str, weight: float = 1.0) -> tuple[Model, Clip]: ...


@node("stub")
def Empty(*, width: int = 512, height: int = 512) -> Latent: ...


@node("stub")
def Sample(
    *,
    model: Model,
    seed: Annotated[int, Widget(seed=True)] = 0,
    steps: int = 20,
    cfg: float = 8.0,
    sampler: Literal["euler", "fixed"],
    positive: Conditioning,
    latent: Latent,
    denoise: float = 1.0,
) -> Latent: ...


@node("stub")
def Decode(*, samples: Latent, vae: Vae) -> Picture: ...


@node("stub", is_output=True)
def Save(*, images: Picture, prefix: str = "fox", quality: Annotated[int, Widget(optional=True)] = 90) -> None: ...


@node("stub")
def Join(
    *, one: Anything | None = None, two: Anything | None = None, flag: bool = True
) -> tuple[Anything, Anything]: ...


NODES: dict[str, NodeType] = {each.name: each for each in (Load, Encode, Lora, Empty, Sample, Decode, Save, Join)}


@pytest.fixture(autouse=True, scope="module")
def stubs_in_the_library() -> Iterator[None]:
    """Scripts import their nodes from ``mahlstick.nodes``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, each in {**NODES, "Workflow": Workflow}.items():
            patch.setitem(vars(mahlstick.nodes), name, each)
        yield


# Saved workflows, written as ComfyUI writes them


def drawn(id: Any, kind: str, inputs: Any = (), values: Any = (), **more: Any) -> dict[str, Any]:
    """A node of a saved workflow. Inputs: (name, type, link), a fourth says that it is a widget's too."""
    slots = [
        {"name": name, "type": type, "link": link} | ({"widget": {"name": name}} if widget else {})
        for name, type, link, *widget in inputs
    ]
    return {"id": id, "type": kind, "inputs": slots, "widgets_values": values, **more}


def saved(*nodes: dict[str, Any], links: Any = (), **more: Any) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": list(links), "version": 0.4, **more}


def inputs_of(ui: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: step["inputs"] for name, step in to_api(ui, NODES).items()}


def test_widgets_reroutes_primitives_and_notes() -> None:
    into_sample = [[5, 4, 0, 3, 0, "MODEL"], [6, 6, 0, 3, 1, "C"], [7, 8, 0, 3, 2, "LATENT"], [8, 10, 0, 3, 3, "FLOAT"]]
    ui = saved(
        drawn(7, "Note", values=["hello"]),
        drawn(4, "Load", values=["b.ckpt"], title="Base"),
        drawn(9, "Reroute", [("", "*", 1)]),
        drawn(6, "Encode", [("clip", "CLIP", 2), ("text", "STRING", 3, True)], ["old text"], title="Encode Text"),
        drawn(5, "PrimitiveNode", values=["a red fox", "fixed"]),
        drawn(8, "Empty", values=[64, 32, "left by a page"]),
        drawn(
            3,
            "Sample",
            [
                ("model", "MODEL", 5),
                ("positive", "CONDITIONING", 6),
                ("latent", "LATENT", 7),
                ("cfg", "FLOAT", 8, True),
            ],
            [17, "randomize", 20, 8, "fixed", 0.5],
        ),
        drawn(10, "PrimitiveNode", values=[4.5, "fixed"], outputs=[{"name": "FLOAT", "type": "FLOAT"}]),
        links=[[1, 4, 1, 9, 0, "CLIP"], [2, 9, 0, 6, 0, "CLIP"], [3, 5, 0, 6, 1, "STRING"], None, *into_sample],
    )
    sample = {"model": ["4", 0], "positive": ["6", 0], "latent": ["8", 0], "seed": 17, "steps": 20, "cfg": 4.5}
    assert to_api(ui, NODES) == {
        "4": {"class_type": "Load", "inputs": {"name": "b.ckpt"}, "_meta": {"title": "Base"}},
        "6": {"class_type": "Encode", "inputs": {"clip": ["4", 1], "text": "a red fox"}},
        "8": {"class_type": "Empty", "inputs": {"width": 64, "height": 32}},
        "3": {"class_type": "Sample", "inputs": {**sample, "sampler": "fixed", "denoise": 0.5}},
    }


def test_the_ways_in_which_widgets_were_saved() -> None:
    ui = saved(
        drawn(1, "Sample", values=[17, True, 20, 8, "euler", 0.5]),  # the oldest pages: a tick for a new seed
        drawn(2, "Sample", values=[17, 20, 8, "euler", 0.5]),  # written by a program
        drawn(3, "Sample", values=[17, "fixed", 20]),  # older than the node's later inputs
        drawn(4, "Save", values={"prefix": "owl", "crf": 19, "videopreview": {"hidden": False}}),
        drawn(5, "Save", values=["x", 1], widgets_values_named={"prefix": "named", "quality": 2}),
        drawn(6, "Empty") | {"inputs": None, "widgets_values": None},
        drawn(7, "Empty", values=[None, [1, 2]]),
    )
    found = inputs_of(ui)
    assert found["1"] == found["2"] == {"seed": 17, "steps": 20, "cfg": 8, "sampler": "euler", "denoise": 0.5}
    assert found["3"] == {"seed": 17, "steps": 20, "cfg": 8.0, "sampler": "euler", "denoise": 1.0}
    assert found["4"] == {"prefix": "owl", "quality": 90, "crf": 19}
    assert found["5"] == {"prefix": "named", "quality": 2}
    assert found["6"] == {"width": 512, "height": 512}
    assert found["7"] == {"width": 512, "height": {"__value__": [1, 2]}}


def test_bypassed_and_muted_nodes() -> None:
    def lora(mode: int) -> dict[str, Any]:
        outputs = [{"name": "MODEL", "type": "MODEL"}, {"name": "CLIP", "type": "CLIP"}]
        return drawn(2, "Lora", [("clip", "CLIP", 2), ("model", "MODEL", 1)], ["x", 1], mode=mode, outputs=outputs)

    links = [[1, 1, 0, 2, 1, "MODEL"], [2, 1, 1, 2, 0, "CLIP"], [3, 2, 0, 3, 0, "MODEL"], [4, 2, 1, 4, 0, "CLIP"]]
    after = [drawn(3, "Sample", [("model", "MODEL", 3)], [1]), drawn(4, "Encode", [("clip", "CLIP", 4)], ["x"])]
    found = {
        mode: inputs_of(saved(drawn(1, "Load", values=["a.ckpt"]), lora(mode), *after, links=links))
        for mode in (0, 2, 4)
    }
    assert [found[0]["3"]["model"], found[0]["4"]["clip"]] == [["2", 0], ["2", 1]]
    assert [found[4]["3"]["model"], found[4]["4"]["clip"]] == [["1", 0], ["1", 1]]
    assert "model" not in found[2]["3"] and "clip" not in found[2]["4"]
    assert list(found[2]) == list(found[4]) == ["1", "3", "4"]


def test_what_takes_a_bypassed_nodes_place() -> None:
    """The input beside the output before the others, exactly the wanted type before one that fits."""

    def passed(wanted: str, inputs: list[str], outputs: list[str]) -> Any:
        slots = [(f"in{i}", type, i) for i, type in enumerate(inputs)]
        bypassed = drawn(8, "Odd", slots, mode=4, outputs=[{"name": "o", "type": type} for type in outputs])
        sources = [drawn(i, "Empty") for i in range(len(inputs))]
        links = [[i, i, 0, 8, i, "LATENT"] for i in range(len(inputs))] + [[9, 8, len(outputs) - 1, 10, 0, wanted]]
        return inputs_of(saved(*sources, bypassed, drawn(10, "Join", [("one", wanted, 9)]), links=links))["10"].get(
            "one"
        )

    assert passed("LATENT", ["MODEL", "LATENT"], ["LATENT"]) == ["1", 0]
    assert passed("LATENT", ["LATENT", "LATENT"], ["MODEL", "LATENT"]) == ["1", 0]
    assert passed("LATENT", ["IMAGE", "IMAGE,LATENT", "LATENT"], ["LATENT"]) == ["2", 0]
    assert passed("latent,IMAGE", ["MODEL", "LATENT"], ["LATENT"]) == ["1", 0]
    assert passed("*", ["MODEL", "LATENT"], ["LATENT"]) == ["0", 0]
    assert passed("MASK", ["MODEL", "LATENT"], ["MASK"]) is None


def link(id: int, origin: int, slot: int, target: int, place: int, **more: Any) -> dict[str, Any]:
    ends = {"origin_id": origin, "origin_slot": slot, "target_id": target, "target_slot": place}
    return {"id": id, **ends, "type": "*", **more}


def test_the_newer_schema_with_reroutes_and_hidden_links() -> None:
    """Version 1 has links as objects; the page's own reroutes lie on them. Set and get join nodes without a link."""
    ui = saved(
        drawn(1, "Load", values=["a.ckpt"]),
        drawn(2, "SetNode", [("CLIP", "CLIP", 1)], ["clip"]),
        drawn(3, "GetNode", values=["clip"]),
        drawn(4, "Encode", [("clip", "CLIP", 2)], ["x"]),
        drawn(5, "Encode", [("clip", "CLIP", 3)], ["y"]),
        links=[link(1, 1, 1, 2, 0), link(2, 3, 0, 4, 0), link(3, 1, 1, 5, 0, parentId=8)],
        reroutes=[{"id": 8, "pos": [0, 0], "linkIds": [3]}],
        state={"lastNodeId": 5},
    )
    ui["version"] = 1
    found = inputs_of(ui)
    assert found["4"]["clip"] == found["5"]["clip"] == ["1", 1]
    assert list(found) == ["1", "4", "5"]


INNER = {
    "id": "inner",
    "inputs": [{"name": "clip", "type": "CLIP"}, {"name": "words", "type": "STRING"}],
    "outputs": [{"name": "CONDITIONING", "type": "CONDITIONING"}, {"name": "CLIP", "type": "CLIP"}],
    "nodes": [drawn(1, "Encode", [("clip", "CLIP", 1), ("text", "STRING", 2, True)], ["inside"])],
    "links": [link(1, -10, 0, 1, 0), link(2, -10, 1, 1, 1), link(3, 1, 0, -20, 0), link(4, -10, 0, -20, 1)],
}
OUTER = {
    "id": "outer",
    "inputs": [{"name": "clip", "type": "CLIP"}, {"name": "words", "type": "STRING"}, {"name": "seed", "type": "INT"}],
    "outputs": [{"name": "LATENT", "type": "LATENT"}],
    "nodes": [
        drawn(3, "Sample", [("positive", "CONDITIONING", 13), ("seed", "INT", 15, True)], [5, "fixed", 30]),
        drawn(2, "inner", [("clip", "CLIP", 11), ("words", "STRING", 12, True)]),
        drawn(7, "Decode", [("vae", "VAE", None)], mode=2),
    ],
    "links": [
        *(link(11, -10, 0, 2, 0), link(12, -10, 1, 2, 1), link(13, 2, 0, 3, 0), link(14, 3, 0, -20, 0)),
        link(15, -10, 2, 3, 1),
    ],
}


def with_subgraphs(host: dict[str, Any], *nodes: dict[str, Any], links: Any = ()) -> dict[str, dict[str, Any]]:
    both = {"subgraphs": [OUTER, INNER]}
    given = [drawn(1, "Load", values=["a.ckpt"]), host, drawn(6, "Join", [("one", "*", 22)]), *nodes]
    lines = [[21, 1, 1, host["id"], 0, "CLIP"], [22, host["id"], 0, 6, 0, "LATENT"], *links]
    return inputs_of(saved(*given, links=lines, definitions=both))


def test_nested_subgraphs() -> None:
    slots = [("clip", "CLIP", 21)]
    found = with_subgraphs(drawn(5, "outer", slots))
    assert sorted(found) == ["1", "5:2:1", "5:3", "6"]
    assert found["5:2:1"] == {"clip": ["1", 1], "text": "inside"}
    assert found["5:3"]["positive"] == ["5:2:1", 0]
    assert found["6"]["one"] == ["5:3", 0]
    assert (found["5:3"]["seed"], found["5:3"]["steps"]) == (5, 30)

    shown = [  # what the node outside shows of the widgets inside, in the ways it was saved
        drawn(5, "outer", slots, ["outside", 9]),
        drawn(5, "outer", slots, ["outside", 9, "randomize"]),
        drawn(5, "outer", slots, widgets_values_named={"words": "outside", "seed": 9}),
        drawn(5, "outer", slots, ["outside", 9], properties={"proxyWidgets": [["-1", "words"], ["-1", "seed"]]}),
        drawn(5, "outer", slots, [9, "outside"], properties={"proxyWidgets": [["3", "seed"], ["2", "words"]]}),
    ]
    for host in shown:
        found = with_subgraphs(host)
        assert (found["5:2:1"]["text"], found["5:3"]["seed"]) == ("outside", 9), host
    kept = {"proxyWidgets": [["3", "seed"], ["3", "control_after_generate"], ["2", "$$preview"]]}
    assert with_subgraphs(drawn(5, "outer", slots, [], properties=kept))["5:3"]["seed"] == 5

    primitive = drawn(8, "PrimitiveNode", values=["joined"])
    joined = drawn(5, "outer", [*slots, ("words", "STRING", 23, True)], ["outside", 9])
    found = with_subgraphs(joined, primitive, links=[[23, 8, 0, 5, 1, "STRING"]])
    assert (found["5:2:1"]["text"], found["5:3"]["seed"]) == ("joined", 9)

    assert sorted(with_subgraphs(drawn(5, "outer", slots, mode=2))) == ["1", "6"]
    passing = drawn(5, "inner", slots, mode=4, outputs=[{"name": "CLIP", "type": "CLIP"}])
    assert with_subgraphs(passing)["6"]["one"] == ["1", 1]
    through = drawn(9, "Encode", [("clip", "CLIP", 24)], ["x"])
    found = with_subgraphs(drawn(5, "inner", slots), through, links=[[24, 5, 1, 9, 0, "CLIP"]])
    assert found["9"]["clip"] == ["1", 1]


def test_a_group_node() -> None:
    """The older kind of subgraph: its nodes by their place, its slots what is open, its widgets all that are inside."""
    inside = [
        drawn(-1, "Encode", [("clip", "CLIP", None)], ["saved"], outputs=[{"name": "C", "type": "CONDITIONING"}]),
        drawn(
            -1,
            "Sample",
            [("model", "MODEL", None), ("positive", "CONDITIONING", None), ("latent", "LATENT", None)],
            [1, "fixed", 20, 8, "euler", 1],
            outputs=[{"name": "LATENT", "type": "LATENT"}],
        ),
    ]
    group = {"nodes": inside, "links": [[0, 0, 1, 1, 4, "CONDITIONING"]], "external": []}
    host = drawn(
        5,
        "workflow>mine",
        [("clip", "CLIP", 1), ("model", "MODEL", 2), ("latent", "LATENT", 3)],
        ["shown", 17, "randomize", 25, 7, "fixed", 0.5],
    )
    links = [[1, 1, 1, 5, 0, "CLIP"], [2, 1, 0, 5, 1, "MODEL"], [3, 2, 0, 5, 2, "LATENT"], [4, 5, 0, 6, 0, "LATENT"]]
    nodes = [
        drawn(1, "Load", values=["a.ckpt"]),
        drawn(2, "Empty"),
        host,
        drawn(6, "Decode", [("samples", "LATENT", 4)]),
    ]
    found = inputs_of(saved(*nodes, links=links, extra={"groupNodes": {"mine": group}}))
    assert found["5:0"] == {"clip": ["1", 1], "text": "shown"}
    links_in = {"model": ["1", 0], "positive": ["5:0", 0], "latent": ["2", 0]}
    assert found["5:1"] == {**links_in, "seed": 17, "steps": 25, "cfg": 7, "sampler": "fixed", "denoise": 0.5}
    assert found["6"]["samples"] == ["5:1", 0]


def test_nodes_that_nobody_knows() -> None:
    told = [
        ("image", "IMAGE", 1),
        ("amount", "FLOAT", None, True),
        ("seed", "INT", None, True),
        ("upload", "IMAGEUPLOAD", None, True),
    ]
    ui = saved(
        drawn(1, "Empty"),
        drawn(2, "Blur (mine)", told, [0.25, 4, "increment", "image"]),
        drawn(3, "Label (mine)", values=["looks nice"]),
        links=[[1, 1, 0, 2, 0, "IMAGE"]],
    )
    found = inputs_of(ui)
    assert found["2"] == {"image": ["1", 0], "amount": 0.25, "seed": 4}
    assert list(found) == ["1", "2"]
    ui["nodes"][1]["inputs"] = ui["nodes"][1]["inputs"][:1]
    with pytest.raises(MahlstickError, match=r"Node 2 is a Blur \(mine\), which is not known here.*API format"):
        to_api(ui, NODES)


def test_damaged_workflows() -> None:
    circle = [
        drawn(1, "Reroute", [("", "*", 2)]),
        drawn(2, "Reroute", [("", "*", 1)]),
        drawn(3, "Join", [("one", "*", 1)]),
    ]
    ring = saved(*circle, links=[[1, 1, 0, 2, 0, "*"], [2, 2, 0, 1, 0, "*"]])
    itself = {"subgraphs": [{"id": "a", "nodes": [drawn(1, "b")]}, {"id": "b", "nodes": [drawn(1, "a")]}]}
    doubling = [{"id": f"d{i}", "nodes": [drawn(n, f"d{i + 1}") for n in (1, 2)]} for i in range(40)]
    deep = [{"id": f"d{i}", "nodes": [drawn(1, f"d{i + 1}")]} for i in range(2000)]
    for ui, sentence in [
        (ring, "leads in a circle"),
        (saved(drawn(1, "a"), definitions=itself), "Node 1:1:1 puts a subgraph inside itself"),
        (saved(drawn(1, "d0"), definitions={"subgraphs": doubling}), "more than 10000 times"),
        (saved(drawn(1, "d0"), definitions={"subgraphs": deep}), "nested too deeply"),
        (saved({"id": 1}), r"nodes\.0\.type is not as ComfyUI saves it"),
        (saved(links=[[1, 2]]), r"links\.0\.origin_slot"),
        (saved(extra={"groupNodes": {"g": {"nodes": [{}]}}}), "group node 'g' is not as ComfyUI saves it"),
    ]:
        with pytest.raises(MahlstickError, match=sentence):
            to_api(ui, NODES)


API = {
    "2": {"class_type": "Load", "inputs": {"name": "a.ckpt"}},
    "1": {"class_type": "Encode", "inputs": {"clip": ["2", 1], "text": "x"}, "_meta": {"title": "Positive"}},
}


def test_read_recognises_what_it_is_given(tmp_path: Path) -> None:
    ui = from_api(API, NODES)
    chunks = PngInfo()
    chunks.add_text("workflow", json.dumps(ui))
    Image.new("RGB", (4, 4)).save(tmp_path / "d.png", pnginfo=chunks)
    chunks.add_text("prompt", json.dumps(API))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=chunks)
    tags = Image.Exif()
    tags[0x0110], tags[0x010F] = f"prompt:{json.dumps(API)}", f"workflow:{json.dumps(ui)}"
    Image.new("RGB", (4, 4)).save(tmp_path / "b.webp", exif=tags)
    tags = Image.Exif()
    tags[0x010F] = f"Workflow:{json.dumps(ui)}"
    Image.new("RGB", (4, 4)).save(tmp_path / "c.webp", exif=tags)
    (tmp_path / "ui.json").write_text(json.dumps(ui), encoding="utf-8-sig")
    files = [tmp_path / name for name in ("a.png", "d.png", "b.webp", "c.webp", "ui.json")]
    for source in [
        API,
        ui,
        {"prompt": API, "client_id": "x"},
        json.dumps(API),
        "\n" + json.dumps(ui),
        str(files[0]),
        *files,
    ]:
        assert read(source, NODES) == API


def test_read_says_why_not(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    chunk = struct.pack(">4sIIBBBBB", b"IHDR", 50_000, 50_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header)
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('{"1": ')
    for source, sentence in [
        (tmp_path / "plain.png", "plain.png holds no workflow"),
        (tmp_path / "broken.png", "broken.png: not a readable picture"),
        (tmp_path / "huge.png", "huge.png: not a readable picture"),
        (tmp_path / "missing.png", "missing.png: no such file"),
        (tmp_path / "missing.json", "missing.json: no readable workflow"),
        (tmp_path / "list.json", "list.json holds no workflow"),
        (tmp_path / "half.json", "half.json is not JSON"),
        ('{"a": ' * 100_000, "is not JSON"),
        ({"a": 1}, "holds no workflow"),
    ]:
        with pytest.raises(MahlstickError, match=sentence) as caught:
            read(source, NODES)
        assert "\n" not in str(caught.value)


# There and back


NAMES = st.text(st.sampled_from("ab1_ :é-\"'\\\n"), min_size=1, max_size=6) | st.sampled_from(
    ["class", "_id", "self", "x"]
)
CONSTANTS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.floats(allow_nan=False),
    st.text(max_size=12) | st.sampled_from(["fixed", "randomize", "a \"quote\" and 'another'", "two\nlines"]),
    st.fixed_dictionaries({"__value__": st.lists(st.integers() | st.text(max_size=3), max_size=3)}),
)


@st.composite
def graphs(draw: Any) -> dict[str, Any]:
    """API JSON of any ids, titles and kinds, known or not, with links to any slot, in any order."""
    ids = draw(st.lists(st.integers(0, 40).map(str) | st.sampled_from(["7:3", "7:3:1", "b"]), unique=True, max_size=7))
    api: dict[str, Any] = {}
    for i, name in enumerate(ids):
        kind = NODES.get(draw(st.sampled_from([*NODES, "Odd node"])))
        links = st.tuples(st.sampled_from(ids[:i]), st.integers(0, 4)).map(list) if i else st.nothing()
        inputs = {each.name: draw(CONSTANTS | links) for each in (kind.inputs if kind else ()) if each.is_widget}
        inputs |= {each.name: draw(CONSTANTS | links) for each in (kind.inputs if kind else ()) if draw(st.booleans())}
        odd = (0, 2) if kind else (1, 3)  # of nodes that nobody knows, the page keeps those that have an input
        inputs |= draw(st.dictionaries(NAMES, CONSTANTS | links, min_size=odd[0], max_size=odd[1]))
        api[name] = {"class_type": kind.name if kind else "Odd node", "inputs": inputs}
        if draw(st.booleans()):
            api[name]["_meta"] = {"title": draw(st.text(min_size=1, max_size=30).filter(lambda t: t not in NODES))}
    return dict(draw(st.permutations(list(api.items()))))


def same(one: Any, other: Any) -> bool:
    """Equal to the types of the numbers, whatever the order of the inputs."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost(api: dict[str, Any]) -> None:
    text = to_python(api, NODES)
    assert same(from_python(text), api), text
    ui = json.loads(json.dumps(from_api(api, NODES)))
    assert same(to_api(ui, NODES), api)
    check_drawing(ui)


def check_drawing(ui: dict[str, Any]) -> None:
    """Nothing overlaps, what a link leaves stands left of where it goes, and both its ends know it."""
    nodes = {node["id"]: node for node in ui["nodes"]}
    for one, other in combinations(ui["nodes"], 2):
        apart = [
            a["pos"][axis] + a["size"][axis] + (30 if axis else 0) <= b["pos"][axis]  # a title stands above its node
            for a, b in ((one, other), (other, one))
            for axis in (0, 1)
        ]
        assert any(apart)
    for number, origin, slot, target, place, _ in ui["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
        assert nodes[origin]["pos"][0] < nodes[target]["pos"][0] and nodes[origin]["order"] < nodes[target]["order"]


def test_a_script_reads_well() -> None:
    api = {
        "1": {"class_type": "Load", "inputs": {"name": "a.ckpt"}},
        "2": {
            "class_type": "Encode",
            "inputs": {"clip": ["1", 1], "text": "a red fox"},
            "_meta": {"title": "The Fox!"},
        },
        "3": {"class_type": "Empty", "inputs": {"width": 64, "height": 64}},
        "4": {"class_type": "OddNode (mine)", "inputs": {"in put": ["3", 0], "amount": 0.1}},
        "5": {
            "class_type": "Sample",
            "inputs": {
                **{"model": ["1", 0], "seed": 7, "steps": 20, "cfg": 8.0, "sampler": "euler"},
                **{"positive": ["2", 0], "latent": ["4", 2], "denoise": 1.0},
            },
        },
        "6": {"class_type": "Decode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "Save", "inputs": {"images": ["6", 0], "prefix": "fox"}},
    }
    script = """\
from mahlstick.nodes import Workflow, Decode, Empty, Encode, Load, Sample, Save

with Workflow() as w:
    model, clip, vae = Load(name="a.ckpt")
    (the_fox,) = Encode(clip=clip, text="a red fox", _title="The Fox!")
    (in_put,) = Empty(width=64, height=64)
    odd_node_mine = w.node("OddNode (mine)", {"in put": in_put, "amount": 0.1})
    (samples,) = Sample(
        model=model,
        seed=7,
        steps=20,
        cfg=8.0,
        sampler="euler",
        positive=the_fox,
        latent=odd_node_mine[2],
        denoise=1.0,
    )
    (images,) = Decode(samples=samples, vae=vae)
    Save(images=images, prefix="fox")

if __name__ == "__main__":
    w.run()
"""
    assert to_python(api, NODES) == script
    assert same(from_python(script), api)


def test_graphs_that_will_not_run_are_written_down_too() -> None:
    ring = {
        "a": {"class_type": "Join", "inputs": {"one": ["b", 0], "flag": True}},
        "b": {"class_type": "Join", "inputs": {"one": ["a", 1], "two": ["gone", 0], "flag": float("inf")}},
        "c": {"class_type": "Sample", "inputs": {"seed": 1}},
    }
    assert same(from_python(to_python(ring, NODES)), ring)
    assert len(from_api(ring, NODES)["links"]) == 2


def test_scripts_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from mahlstick.nodes import Workflow, Empty, Join\n"
        "with Workflow() as w:\n"
        "    (a,) = Empty()\n"
        "    (b,) = Empty(width=8, _id=1)\n"
        "    Join(one=a, two=b, _id='x', _title='Both')\n"
        "w.run = None\n"
    )
    assert (
        from_python(file)
        == from_python(file.read_text())
        == {
            "2": {"class_type": "Empty", "inputs": {"width": 512, "height": 512}},
            "1": {"class_type": "Empty", "inputs": {"width": 8, "height": 512}},
            "x": {
                "class_type": "Join",
                "inputs": {"one": ["2", 0], "two": ["1", 0], "flag": True},
                "_meta": {"title": "Both"},
            },
        }
    )
    with Workflow() as w:
        Join(one=Empty()[0])
    assert to_api(w.ui, NODES) == w.api and Empty.function is not None
    head = "from mahlstick.nodes import Workflow, Empty, Join\n"
    for text, sentence in [
        ("x = 1\n", "makes no workflow"),
        (f"{head}with Workflow() as w:\n    Empty(widht=3)\n", "line 3: .*Empty has no input 'widht'"),
        (f"{head}with Workflow() as w:\n    Empty(\n", "line 3: SyntaxError"),
        (f"{head}with Workflow() as w:\n    a, b = w.node('X', {{}})\n", "line 3: TypeError"),
        (
            f"{head}with Workflow() as w:\n    Empty(_id=1)\n    Empty(_id=1)\n",
            "Two nodes of the workflow have the id 1",
        ),
        (
            f"{head}with Workflow() as v:\n    a, = Empty()\nwith Workflow() as w:\n    Join(one=a)\n",
            "another workflow",
        ),
    ]:
        with pytest.raises(MahlstickError, match=sentence):
            from_python(text)


def test_large_graphs() -> None:
    """A chain longer than Python calls deep, there and back."""
    api = {"0": {"class_type": "Join", "inputs": {"flag": True}}}
    api |= {str(i): {"class_type": "Join", "inputs": {"one": [str(i - 1), 1], "flag": True}} for i in range(1, 2000)}
    assert same(to_api(from_api(api, NODES), NODES), api)
    assert same(from_python(to_python(api, NODES)), api)
    chain = [drawn(i, "Reroute", [("", "*", i)]) for i in range(1, 3000)]
    links = [[i, i - 1, 0, i, 0, "*"] for i in range(1, 3001)]
    found = inputs_of(saved(drawn(0, "Empty"), *chain, drawn(3000, "Join", [("one", "*", 3000)]), links=links))
    assert found["3000"]["one"] == ["0", 0]


# The workflows that come along


NOT_SHIPPED = {"lora": "style.safetensors", "animate": "embedded:motion"}


@pytest.mark.parametrize("file", sorted((ASSETS / "workflows").glob("*.json")), ids=lambda file: file.stem)
def test_example_workflows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From ComfyUI's page to API JSON to Python and back, unchanged; and what they name is there."""
    nodes = all_nodes()
    for name, each in nodes.items():
        monkeypatch.setitem(vars(mahlstick.nodes), name, each)
    ui = json.loads(file.read_text())
    with folders.using(folders.Folders(input=ASSETS / "examples")):
        api = read(file, nodes)
        text = to_python(api, nodes)
        assert same(from_python(text), api)
        assert "w.node(" not in text  # each call fits its node's inputs
        assert same(to_api(from_api(api, nodes), nodes), api)
        check_drawing(ui)
        if file.stem in NOT_SHIPPED:
            with pytest.raises(MahlstickError, match=NOT_SHIPPED[file.stem]):
                validate(parse(api), nodes)
        else:
            assert len(validate(parse(api), nodes)) == 1
