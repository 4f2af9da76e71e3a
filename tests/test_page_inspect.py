"""What the page says of files: kinds, fits, ways to use them, and what it refuses."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from safetensors.torch import save_file

import mahlstick as ms
from benchmarks import tiny
from mahlstick.page.history import History
from mahlstick.page.models import Models
from mahlstick.page.weights import Inspect, fit, how_to_use, look
from mahlstick.pipelines.load import embedded_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each kind."""
    folder = tmp_path_factory.mktemp("models")
    unet = tiny.components("sd1")["unet"]
    ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32, 32)).save_pretrained(folder / "net")
    ms.MotionAdapter.from_unet(unet, max_frames=8).save_pretrained(folder / "motion.safetensors")
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(4, 1)}
    save_file(lora, folder / "lora.safetensors")
    edges = {"block1.convs.0.weight": torch.zeros(4, 3, 3, 3), "block5.projection.weight": torch.zeros(1, 4, 1, 1)}
    torch.save(edges, folder / "edges.pth")
    save_file({"fc.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    (folder / "junk.bin").write_bytes(b"not weights at all")
    return folder


@pytest.fixture
def tab(models: Path, tmp_path: Path) -> Any:
    with gr.Blocks():
        return Inspect(Models(models), History(tmp_path), gr.BrowserState(None), gr.Dropdown(["embedded"]))


def said(tab: Inspect, name: str, base: str = "embedded") -> str:
    """All that the page shows of a file."""
    found = tab._inspect_chosen(name, "mine", base, None)  # type: ignore[arg-type]
    lines = [found[line]["value"] for line in tab.lines]
    return "\n".join([found[tab.error], found[tab.facts], *lines])


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("lineart", ["A ControlNet", "It fits.", "--control", "ms.ControlNet.from_pretrained("]),
        ("net", ["A ControlNet", "It does not fit: this ControlNet was made for", "--control"]),
        ("motion.safetensors", ["A motion module", "--motion", "ms.MotionAdapter.from_pretrained("]),
        ("lora.safetensors", ["A LoRA", "does not tell whether it fits", "pipe.load_lora_weights(", "lora_name="]),
        ("edges.pth", ["A network of the annotator softedge", "mahlstick annotate softedge"]),
        ("other.safetensors", ["has a layout that is not known: found fc.weight"]),
        ("junk.bin", ["junk.bin is not a checkpoint"]),
        ("absent", ["absent is not here any more"]),
    ],
)
def test_each_kind_has_its_sentence(tab: Inspect, name: str, sentences: list[str]) -> None:
    shown = said(tab, name)
    assert [sentence for sentence in sentences if sentence not in shown] == []
    assert ('role="alert"' in shown) == (name in ("other.safetensors", "junk.bin", "absent"))


def test_a_fit_depends_on_the_model_chosen(models: Path, tmp_path: Path) -> None:
    tiny.components("sd1")["unet"].save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    assert fit(look(models / "net"), str(tmp_path / "base")) is True
    with pytest.raises(ms.MahlstickError, match="was made for"):
        fit(look(models / "net"), "embedded")
    assert look(tmp_path / "base").kind == "base" and look(embedded_folder()).parameters > 1e6


def test_a_line_for_the_shell_survives_a_name_with_spaces(models: Path) -> None:
    shell, python = how_to_use(look(models / "net"), "my net/a 'b'")
    import shlex

    assert shlex.split(shell)[-1] == "my net/a 'b'=drawing.png"
    assert eval(python.partition("(")[2].rstrip(")")) == "my net/a 'b'"


def test_a_dropped_file_is_named_without_its_place_and_gone_afterwards(
    tab: Inspect, models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": _Runs(tmp_path / "ran")}))
    found = tab._inspect_drop(str(path), "embedded", None)  # type: ignore[arg-type]
    assert "evil.ckpt was refused" in found[tab.error] and str(tmp_path) not in found[tab.error]
    assert not (tmp_path / "ran").exists() and not path.exists()


class _Runs:
    """What a pickle could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_session_sees_what_it_trained_and_no_other_does(tab: Inspect, models: Path) -> None:
    results = tab._history.results("mine")
    results.mkdir(parents=True)
    (results / "learned").symlink_to(models / "net")
    assert "learned" in tab._files("mine") and "learned" not in tab._files("yours")
    offered = tab._models.of(results).nets
    assert "learned" in [shown for shown, _ in offered]
    request = ms.Request(prompt="x", controls=[{"adapter": dict(offered)["learned"], "image": "a.png"}])
    tab._models.of(results).check(request)
    with pytest.raises(ms.MahlstickError, match="is not offered"):
        tab._models.of(tab._history.results("yours")).check(request)
