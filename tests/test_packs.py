"""Third-party packs of nodes: a V1 class is a kind of node like any other, and brings nothing into the process."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mahlstick.errors import MahlstickError
from mahlstick.nodes import cache, folders, progress
from mahlstick.nodes.comfy.packs import load_pack
from mahlstick.nodes.comfy.script import from_python, to_python
from mahlstick.nodes.graph import call_with, parse, validate
from mahlstick.nodes.schema import Blocked, Input, NodeType, Output, Returned

PACK = '''
import folder_paths
import nodes
from comfy.utils import ProgressBar, common_upscale
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder
from .helpers import doubled

class AnyType(str):
    def __ne__(self, other):
        return False

class Everything:
    """Every feature of a class."""

    made = 0
    RETURN_TYPES = ("IMAGE", ["near", "far"], AnyType("*"))
    RETURN_NAMES = ("picture", "which")
    OUTPUT_IS_LIST = (False, False, True)
    FUNCTION = "work"
    CATEGORY = "tests/packs"
    DESCRIPTION = "Does all."
    OUTPUT_NODE = True

    def __init__(self):
        type(self).made += 1

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "model": (folder_paths.get_filename_list("checkpoints"), {"default": "a"}),
                "width": ("INT", {"default": 8, "min": 1, "max": nodes.MAX_RESOLUTION, "step": 8}),
                "mode": ("COMBO", {"options": ["near", "far"], "tooltip": "Which."}),
                "held": ("FLOAT", {"forceInput": True}),
            },
            "optional": {"more": (AnyType("*"), {"lazy": True}), "text": ("STRING", {"multiline": True})},
            "hidden": {"prompt": "PROMPT", "me": ("UNIQUE_ID",), "token": "AUTH_TOKEN"},
        }

    @classmethod
    def IS_CHANGED(cls, text=None, **inputs):
        return float("nan") if text == "always" else text

    @classmethod
    def VALIDATE_INPUTS(cls, width, input_types):
        import folder_paths  # as late as this
        return True if width % 2 == 0 else f"{width} is odd, and image is {input_types.get('image')}"

    def check_lazy_status(self, mode, more=None):
        return ["more"] if mode == "far" and more is None else []

    def work(self, image, width, mode, prompt=None, me=None, **others):
        import comfy.utils
        bar = comfy.utils.ProgressBar(2)
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(2, 2, ("JPEG", "a picture", 512))
        pixels = common_upscale(image.movedim(-1, 1), width, width, "nearest-exact", "center").movedim(1, -1)
        return {"ui": {"text": [me]}, "result": (pixels, mode, doubled([others.get("text")]))}

class Grows:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"count": ("INT", {"default": 2})}})
    RETURN_TYPES = ("INT",)
    FUNCTION = "grow"

    def grow(self, count):
        if not count:
            return (ExecutionBlocker("there is nothing"),)
        graph = GraphBuilder(prefix="g.")
        last = graph.node("Everything", width=count)
        end = graph.node("Grows", "end", count=last.out(0), other=1)
        end.set_input("other", None)
        end.set_override_display_id("7")
        graph.replace_node_output("1", 0, last.out(2))
        return {"result": (end.out(0),), "expand": graph.finalize()}

class Blocks:
    INPUT_TYPES = lambda: {}
    RETURN_TYPES = ("A", "B")
    FUNCTION = "block"

    def block(self):
        return ExecutionBlocker(None)

class Waits:
    INPUT_TYPES = lambda: {"required": {"values": ("INT", {})}}
    INPUT_IS_LIST = True
    RETURN_TYPES = ()
    FUNCTION = "wait"

    async def wait(self, values):
        import asyncio, folder_paths
        await asyncio.sleep(0)
        import nodes
        self.seen = values

NODE_CLASS_MAPPINGS = {"Everything": Everything, "Grows": Grows, "Blocks (all)": Blocks, "Waits": Waits}
NODE_DISPLAY_NAME_MAPPINGS = {"Everything": "All that there is"}
'''


@pytest.fixture
def pack(tmp_path: Path) -> dict[str, NodeType]:
    folder = tmp_path / "my-pack"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACK)
    (folder / "helpers.py").write_text("import folder_paths\ndef doubled(values):\n    return values * 2\n")
    return load_pack(folder)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path) -> Any:
    made = folders.Folders(*(tmp_path / name for name in ("models", "input", "output", "temp")))
    (made.models / "checkpoints").mkdir(parents=True)
    made.input.mkdir()
    with folders.using(made):
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Any:
    others = sys.modules["nodes"] = type(sys)("nodes")  # somebody else's module of that name
    yield
    assert sys.modules.pop("nodes") is others
    assert not {"folder_paths", "comfy", "comfy.utils", "comfy_execution", "server"} & set(sys.modules)


def test_the_schema_of_a_class(pack: dict[str, NodeType], own_folders: folders.Folders) -> None:
    node = pack["Everything"]
    (own_folders.models / "checkpoints" / "new.ckpt").touch()  # choices are looked up each time
    image, model, width, mode, held, more, text = node.inputs
    assert image == Input("image", "IMAGE")
    assert (model.type, model.choices, model.is_widget) == ("COMBO", ("new.ckpt",), True)
    assert (width.type, width.options["max"], width.is_widget) == ("INT", 16384, True)
    assert (mode.type, mode.choices, mode.options) == ("COMBO", ("near", "far"), {"tooltip": "Which."})
    assert not held.is_widget and more.lazy and more.type == "*" and not more.required and not text.required
    assert node.hidden == {"prompt": "PROMPT", "me": "UNIQUE_ID"}
    outputs = [("IMAGE", "picture", False), ("COMBO", "which", False), ("*", "*", True)]
    assert node.outputs == tuple(Output(*each) for each in outputs)
    assert (node.is_output, node.takes_lists, node.is_async) == (True, False, False)
    assert (node.category, node.display_name, node.description) == ("tests/packs", "All that there is", "Does all.")
    assert node.info["input"]["required"]["mode"] == [["near", "far"], {"tooltip": "Which."}]
    assert pack["Waits"].takes_lists and pack["Waits"].is_async and pack["Waits"].outputs == ()
    assert pack["Blocks (all)"].inputs == () and pack["Grows"].info["output"] == ["INT"]


def test_a_class_at_work(pack: dict[str, NodeType]) -> None:
    node = pack["Everything"]
    heard: list[Any] = []
    image = torch.rand(1, 4, 8, 3)
    with progress.listening(lambda *said: heard.append(said)):
        found = node.returned(node.bind()(image=image, width=2, mode="near", me="5", text="x"))
    pixels, mode, texts = found.outputs
    assert pixels.shape == (1, 2, 2, 3) and mode == "near" and texts == ["x", "x"] and found.ui == {"text": ["5"]}
    assert heard == [(1, 2, None), (1, 2, None), (2, 2, "a picture")]

    def stop(*_: Any) -> None:
        raise progress.Interrupted

    with progress.listening(stop), pytest.raises(progress.Interrupted):
        node.bind()(image=image, width=2, mode="near")
    made = node.source.made
    node.bind(), node.bind()
    assert node.source.made == made + 2  # each node of a graph has an object of its own
    assert pack["Blocks (all)"]() == (Blocked(), Blocked())
    assert pack["Grows"](count=0) == (Blocked("there is nothing"),)
    asyncio.run(pack["Waits"].bind()(values=[1]))
    assert pack["Waits"](values=[1]) == ()


def test_what_a_class_says_of_itself(pack: dict[str, NodeType]) -> None:
    node = pack["Everything"]
    assert node.fingerprint and node.check and node.needs
    assert call_with(node.fingerprint, {"text": "x", "width": 3}) == "x"
    assert math.isnan(call_with(node.fingerprint, {"text": "always"}))
    types = {"image": "IMAGE"}
    assert call_with(node.check, {"width": 2, "input_types": types, "text": "x"}) is True
    assert call_with(node.check, {"width": 3, "input_types": types}) == "3 is odd, and image is IMAGE"
    assert call_with(node.needs, {"mode": "far", "more": None, "width": 3}) == ["more"]
    assert call_with(node.needs, {"mode": "far", "more": 1}) == call_with(node.needs, {"mode": "near"}) == []
    assert pack["Grows"].check is pack["Grows"].needs is pack["Grows"].fingerprint is None


def test_a_class_that_grows(pack: dict[str, NodeType]) -> None:
    grows = pack["Grows"]
    end = {"class_type": "Grows", "inputs": {"count": ["g.1", 2]}, "override_display_id": "7"}
    graph = {"g.1": {"class_type": "Everything", "inputs": {"width": 3}}, "g.end": end}
    assert grows.returned(grows.bind()(count=3)) == Returned((["g.end", 0],), None, graph)


def test_graphs_with_nodes_of_packs(pack: dict[str, NodeType]) -> None:
    api = {
        "1": {"class_type": "Grows", "inputs": {"count": 2}},
        "2": {"class_type": "Waits", "inputs": {"values": ["1", 0]}},
    }
    text = to_python(api, pack)
    assert 'grows = w.node("Grows", {"count": 2})' in text
    assert from_python(text) == api
    with pytest.raises(MahlstickError, match="no outputs"):
        validate(parse(api), pack)


def test_what_any_file_of_a_pack_changes_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "pack" / "work").mkdir(parents=True)
    (tmp_path / "pack" / "help").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from .work.nodes import NODE_CLASS_MAPPINGS")
    (tmp_path / "pack" / "work" / "nodes.py").write_text(
        "from ..help.sums import one\n"
        "class A:\n    FUNCTION = 'a'\n    RETURN_TYPES = ('A',)\n    INPUT_TYPES = lambda: {}\n"
        "    def a(self):\n        return (one(),)\n"
        "NODE_CLASS_MAPPINGS = {'A': A}\n"
    )
    keys = []
    for text in ("def one(): return 1", "def one(): return 2"):
        (tmp_path / "pack" / "help" / "sums.py").write_text(text)
        cache._digest.cache_clear()  # as in another process
        keys.append(cache.key(load_pack(tmp_path / "pack")["A"], {}, {}))
    assert None not in keys and keys[0] != keys[1]


def test_files_of_packs(own_folders: folders.Folders, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "import folder_paths as f, os\n"
        f"f.add_model_folder_path('mine', {str(tmp_path / 'mine')!r})\n"
        "class A:\n"
        "    FUNCTION = 'a'\n"
        "    RETURN_TYPES = ('A',)\n"
        "    INPUT_TYPES = lambda: {'required': {'x': (f.get_filename_list('mine'),)}}\n"
        "    def a(self, x):\n"
        "        out = f.get_output_directory()\n"
        "        folder, name, number, below, prefix = f.get_save_image_path('sub/fox', out, 4, 4)\n"
        "        places = [f.models_dir, f.get_full_path('mine', x), f.get_full_path('mine', 'none'),\n"
        "                  f.exists_annotated_filepath('no.png')]\n"
        "        return ([os.path.isdir(folder), name, number, below, prefix, *places],)\n"
        "NODE_CLASS_MAPPINGS = {'A': A}\n"
    )
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "disk")
    (tmp_path / "mine" / "w.pth").touch()
    node = load_pack(tmp_path / "one.py")["A"]
    assert node.inputs[0].choices == ("w.pth",)
    (own_folders.output / "sub").mkdir(parents=True)
    (own_folders.output / "sub" / "fox_00004_.png").touch()
    places = [str(own_folders.models), str(tmp_path / "mine" / "w.pth"), None, False]
    assert node(x="w.pth") == ([True, "fox", 5, "sub", "sub/fox", *places],)


def test_packs_that_cannot_be_used(tmp_path: Path) -> None:
    good = "class A:\n    FUNCTION = 'a'\n    a = INPUT_TYPES = lambda *_: {}\nNODE_CLASS_MAPPINGS = {'A': A}\n"
    for text, sentence in [
        ("from server import PromptServer", "needs server, a part of ComfyUI that mahlstick does not have"),
        ("import comfy.samplers", r"needs comfy\.samplers, a part of ComfyUI"),
        ("import no_such_library", "needs the module no_such_library, which is missing; install"),
        ("from comfy.utils import load_torch_file", "ImportError: cannot import name 'load_torch_file'"),
        ("x = 1", "has no NODE_CLASS_MAPPINGS"),
        ("def", "SyntaxError"),
        ("raise SystemExit('too old')", "SystemExit: too old"),
        (good.replace("'a'\n", "'b'\n"), "its node A is not as ComfyUI wants it"),
        (good.replace("{}", "1 / 0"), "its node A is not as ComfyUI wants it .*ZeroDivisionError"),
    ]:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "sub.py").write_text("")
        (folder / "__init__.py").write_text(f"from . import sub\n{text}\n")
        with pytest.raises(MahlstickError, match=f"bad: .*{sentence}") as caught:
            load_pack(folder)
        assert "\n" not in str(caught.value)
        assert not [name for name in sys.modules if name.startswith("mahlstick_pack_") and "bad" in name]
    (tmp_path / "good.py").write_text(good)
    assert list(load_pack(tmp_path / "good.py")) == ["A"]
    with pytest.raises(MahlstickError, match="no pack of nodes"):
        load_pack(tmp_path)
