"""Every layout in and out, the original repositories' numbers, and each kind of bad file."""

from __future__ import annotations

import inspect as python_inspect
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mahlstick.adapters import formats
from mahlstick.adapters.formats import controlnet, ip_adapter
from mahlstick.errors import MahlstickError

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the originals' outputs are not beside this checkout")

TINY = {"block_out_channels": (32, 64), "layers_per_block": 1, "conditioning_embedding_out_channels": (4, 8, 8, 12)}
NETS: dict[str, dict[str, Any]] = {
    "sd1": TINY
    | {
        "cross_attention_dim": 768,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": 8,
    },
    "sd2": TINY
    | {
        "cross_attention_dim": 1024,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
    },
    "sdxl": TINY
    | {
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "block_out_channels": (64, 128),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}

State = dict[str, Tensor]


def randomised(module: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


@pytest.fixture(scope="module")
def nets() -> dict[str, ControlNetModel]:
    return {base: randomised(ControlNetModel(**config)) for base, config in NETS.items()}


@pytest.fixture
def net(nets: dict[str, ControlNetModel]) -> ControlNetModel:
    return nets["sd1"]


def original(net: ControlNetModel, prefix: str = "control_model.") -> State:
    renamed = controlnet.to_original(net.state_dict(), dict(net.config))
    return {prefix + name: value.clone() for name, value in renamed.items()}


def assert_equal(found: State, wanted: State) -> None:
    assert sorted(found) == sorted(wanted)
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, without diffusers' private fields."""
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))


# ControlNet: names and config ---------------------------------------------------------------------------------------


@st.composite
def net_configs(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 4))
    channels = [64 * draw(st.integers(1, 3)) for _ in range(levels)]
    attends = [draw(st.booleans()) for _ in range(levels)]
    depths = [draw(st.integers(0 if i < levels - 1 else 1, 3)) if attends[i] else 1 for i in range(levels)]
    depths[-1] = max(depths[-1], 1)
    linear, added = draw(st.booleans()), draw(st.booleans())
    hint = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    return {
        "in_channels": draw(st.sampled_from((4, 8, 9))),
        "conditioning_channels": draw(st.integers(1, 6)),
        "conditioning_embedding_out_channels": hint,
        "block_out_channels": channels,
        "layers_per_block": draw(st.integers(1, 3)),
        "down_block_types": ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "transformer_layers_per_block": 1 if set(depths) == {1} else depths,
        "cross_attention_dim": draw(st.sampled_from((24, 768, 1024, 2048))) if not added else 2048,
        "use_linear_projection": linear,
        "attention_head_dim": [c // 64 for c in channels] if linear else 8,
        "addition_embed_type": "text_time" if added else None,
        "addition_time_embed_dim": 256 if added else None,
        "projection_class_embeddings_input_dim": 2816 if added else None,
    }


@settings(max_examples=40, deadline=None)
@given(net_configs())
def test_config_and_names_survive_the_shapes_of_any_net(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours = ControlNetModel(**config).state_dict()
    theirs = controlnet.to_original(ours, config)
    assert not set(ours) & set(theirs)
    back = controlnet.from_original(theirs)
    assert {name: value.shape for name, value in back.items()} == {name: v.shape for name, v in ours.items()}
    derived = controlnet.config_of(back, {})
    assert {name: derived[name] for name in config} == config
    assert controlnet.expected(derived) == {name: value.shape for name, value in ours.items()}


def test_sdxl_small_has_no_attention_at_all() -> None:
    config = NETS["sdxl"] | {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}
    with torch.device("meta"):
        ours = ControlNetModel(**config).state_dict()
    derived = controlnet.config_of(ours, {})
    assert (derived["mid_block_type"], derived["cross_attention_dim"]) == ("UNetMidBlock2D", 2048)
    assert controlnet.expected(derived) == {name: value.shape for name, value in ours.items()}


def test_what_no_shape_tells_defaults_as_in_diffusers() -> None:
    signature = python_inspect.signature(ControlNetModel.__init__).parameters
    assert controlnet.DEFAULTS == {name: signature[name].default for name in controlnet.DEFAULTS}
    with torch.device("meta"):
        derived = controlnet.config_of(ControlNetModel().state_dict(), {})
    assert sorted(derived) == sorted(name for name in signature if name != "self")


@pytest.mark.parametrize("base", NETS)
def test_original_names_are_those_that_diffusers_converts(base: str) -> None:
    config = NETS[base] | {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
    net = randomised(ControlNetModel(**config))
    converted = convert_controlnet_checkpoint(original(net), dict(net.config))
    label = {name: value for name, value in net.state_dict().items() if name.startswith("add_embedding.")}
    assert_equal(converted | label, net.state_dict())  # diffusers' converter leaves SDXL's label_emb out
    assert len(label) == (4 if base == "sdxl" else 0)


def test_sdxl_label_embedding_has_the_name_of_the_original_unet(nets: dict[str, ControlNetModel]) -> None:
    found = original(nets["sdxl"], "")
    for theirs, ours in (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")):
        assert torch.equal(found[f"{theirs}.weight"], nets["sdxl"].state_dict()[f"{ours}.weight"])


# ControlNet: files --------------------------------------------------------------------------------------------------

SAVE: dict[str, Callable[[State, Path], None]] = {
    "safetensors": lambda state, path: save_file(state, path),
    "pickle": lambda state, path: torch.save(state, path),
    "old pickle": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "lightning": lambda state, path: torch.save({"state_dict": state, "epoch": 3, "callbacks": {"a": [1]}}, path),
}


@pytest.mark.parametrize("storage", SAVE)
@pytest.mark.parametrize("layout", ["diffusers", "original", "original without prefix", "full checkpoint"])
@pytest.mark.parametrize("base", NETS)
def test_each_layout_loads_under_any_name(
    base: str, layout: str, storage: str, nets: dict[str, ControlNetModel], tmp_path: Path
) -> None:
    net = nets[base]
    state = {
        "diffusers": lambda: dict(net.state_dict()),
        "original": lambda: original(net),
        "original without prefix": lambda: original(net, ""),
        "full checkpoint": lambda: (
            original(net)
            | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "first_stage_model.x": torch.zeros(1)}
        ),
    }[layout]()
    path = tmp_path / "anything.at.all.jpg"
    SAVE[storage](state, path)

    info = formats.inspect(path)
    assert (info.kind, info.base, info.dtype) == ("controlnet", base, "float32")
    assert info.layout == ("original" if layout == "full checkpoint" else layout)
    assert info.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert info.tensors == {name: tuple(value.shape) for name, value in state.items()}

    config, found = formats.read(path, "controlnet")
    assert_equal(found, net.state_dict())
    assert config == info.config
    assert plain(config) == plain(net.config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_precision_is_kept(dtype: torch.dtype, net: ControlNetModel, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in original(net).items()}
    save_file(state, tmp_path / "half")
    assert formats.inspect(tmp_path / "half").dtype == str(dtype).removeprefix("torch.")
    found = formats.read(tmp_path / "half", "controlnet")[1]
    assert_equal(found, {name: value.to(dtype) for name, value in net.state_dict().items()})


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "400KB"}, {"safe_serialization": False}], ids=str
)
def test_folders_that_diffusers_writes(options: dict[str, Any], tmp_path: Path) -> None:
    net = randomised(ControlNetModel(**NETS["sd1"] | {"attention_head_dim": 2, "global_pool_conditions": True}))
    net.save_pretrained(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    config, found = formats.read(tmp_path, "controlnet")
    assert_equal(found, net.state_dict())
    assert plain(config) == plain(net.config)  # heads and pooling, which only config.json tells, are there
    assert formats.inspect(tmp_path).layout == "diffusers"


def test_a_folders_file_is_read_with_its_config_and_a_strangers_config_is_not(tmp_path: Path) -> None:
    net = randomised(ControlNetModel(**NETS["sd1"] | {"attention_head_dim": 2}))
    net.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert formats.read(file, "controlnet")[0]["attention_head_dim"] == 2
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "attention_head_dim": 4}')
    assert formats.read(file, "controlnet")[0]["attention_head_dim"] == 8


def test_full_precision_goes_before_the_variant(net: ControlNetModel, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path)
    save_file({n: v.half() for n, v in net.state_dict().items()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert formats.inspect(tmp_path).dtype == "float32"


def test_heads_and_any_field_can_be_given(net: ControlNetModel, tmp_path: Path) -> None:
    save_file(original(net), tmp_path / "net")
    assert formats.read(tmp_path / "net", "controlnet", heads=4)[0]["attention_head_dim"] == 4
    assert formats.read(tmp_path / "net", "controlnet", heads=[2, 4])[0]["attention_head_dim"] == [2, 4]
    assert formats.read(tmp_path / "net", "controlnet", global_pool_conditions=True)[0]["global_pool_conditions"]
    for wrong in ({"heads": 7}, {"heads": [8]}, {"heads": 0}, {"colour": "red"}, {"cross_attention_dim": 64}):
        with pytest.raises(MahlstickError, match=r"net cannot be read: .*(heads=|colour|64)"):
            formats.read(tmp_path / "net", "controlnet", **wrong)


def test_difference_files_need_their_base(tmp_path: Path) -> None:
    unet = randomised(UNet2DConditionModel(**UNET))
    net = randomised(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)))
    base = unet.state_dict()
    difference = {n: v - base[n] if n in base else v for n, v in net.state_dict().items()}
    theirs = controlnet.to_original(difference, dict(net.config))
    path = tmp_path / "difference"
    save_file({f"control_model.{n}": v for n, v in theirs.items()} | {"difference": torch.empty(0)}, path)

    assert formats.inspect(path).layout == "original difference"
    for given_base in (unet, base):
        found = formats.read(path, "controlnet", base=given_base, heads=4)[1]
        assert found.keys() == net.state_dict().keys()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(found[name], value)
    with pytest.raises(MahlstickError, match=r"difference cannot be read: .*base=pipe.unet"):
        formats.read(path, "controlnet", heads=4)
    other = UNet2DConditionModel(**UNET | {"cross_attention_dim": 16})
    with pytest.raises(MahlstickError, match="another base"):
        formats.read(path, "controlnet", base=other, heads=4)


@pytest.mark.parametrize("base", NETS)
def test_diffusers_reads_what_we_write(base: str, nets: dict[str, ControlNetModel], tmp_path: Path) -> None:
    net = nets[base]
    folder = formats.write(tmp_path / "a" / "net", "controlnet", dict(net.config), net.state_dict())
    loaded = ControlNetModel.from_pretrained(folder)
    assert_equal(loaded.state_dict(), net.state_dict())
    assert plain(loaded.config) == plain(net.config)
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "ControlNetModel"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["net"]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_what_we_write_keeps_the_whole_config(layout: str, tmp_path: Path) -> None:
    net = randomised(ControlNetModel(**NETS["sd1"] | {"attention_head_dim": (2, 4), "norm_num_groups": 16}))
    path = formats.write(tmp_path / "net.safetensors", "controlnet", dict(net.config), net.state_dict(), layout)
    assert path == tmp_path / "net.safetensors"
    config, found = formats.read(path, "controlnet")
    assert plain(config) == plain(net.config)
    assert_equal(found, net.state_dict())
    assert path.is_file()
    assert load_file(path).keys() == (original(net) if layout == "original" else net.state_dict()).keys()


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".pt"])
def test_only_safetensors_files_are_written(
    layout: str, suffix: str, nets: dict[str, ControlNetModel], tmp_path: Path
) -> None:
    net = nets["sd1"]
    with pytest.raises(
        MahlstickError, match=rf"net\{suffix} was not written: give a folder or a name in \.safetensors"
    ):
        formats.write(tmp_path / f"net{suffix}", "controlnet", dict(net.config), net.state_dict(), layout)
    assert not list(tmp_path.iterdir())


def test_writing_over_a_folder_leaves_no_older_weights(nets: dict[str, ControlNetModel], tmp_path: Path) -> None:
    nets["sdxl"].save_pretrained(tmp_path, max_shard_size="1MB")
    (tmp_path / "README.md").write_text("mine")
    formats.write(tmp_path, "controlnet", dict(nets["sd1"].config), nets["sd1"].state_dict())
    assert_equal(formats.read(tmp_path, "controlnet")[1], nets["sd1"].state_dict())
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_shared_and_strided_weights_can_be_written(net: ControlNetModel, tmp_path: Path) -> None:
    state = dict(net.state_dict())
    shared = state["controlnet_down_blocks.0.weight"]
    state["controlnet_down_blocks.1.weight"] = shared
    wide = torch.randn(64, 64, 1, 1)
    state["controlnet_mid_block.weight"] = wide.transpose(0, 1)
    state["conv_in.bias"] = torch.randn(64)[::2]
    formats.write(tmp_path / "net", "controlnet", dict(net.config), state)
    assert_equal(formats.read(tmp_path / "net", "controlnet")[1], state)


def test_a_write_that_fails_changes_nothing(net: ControlNetModel, tmp_path: Path) -> None:
    file, folder = tmp_path / "net.safetensors", tmp_path / "folder"
    for layout, path in (("original", file), ("diffusers", folder)):
        formats.write(path, "controlnet", dict(net.config), net.state_dict(), layout)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        lacking = {n: v for n, v in net.state_dict().items() if n != "conv_in.bias"}
        with pytest.raises(MahlstickError, match=r"was not written.*1 missing \(conv_in.bias\)"):
            formats.write(path, "controlnet", dict(net.config), lacking, layout)
        sparse = net.state_dict() | {"conv_in.bias": net.state_dict()["conv_in.bias"].to_sparse()}
        with pytest.raises((MahlstickError, RuntimeError, ValueError, NotImplementedError)):
            formats.write(path, "controlnet", dict(net.config), sparse, layout)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_places_that_cannot_be_written(net: ControlNetModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    for path, layout in (("file", "diffusers"), ("file/net", "diffusers"), ("folder.safetensors", "original")):
        with pytest.raises(MahlstickError, match=r"is a file|cannot be written|is a folder"):
            formats.write(tmp_path / path, "controlnet", dict(net.config), net.state_dict(), layout)
    for kind, layout in (("vae", "diffusers"), ("controlnet", "webui")):
        with pytest.raises(MahlstickError, match=r"vae|webui"):
            formats.write(tmp_path / "net", kind, dict(net.config), net.state_dict(), layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


# IP-Adapter ---------------------------------------------------------------------------------------------------------

PROJECTORS = {
    "linear": {"projector": "linear", "tokens": 4, "feature_dim": 24},
    "resampler": {
        "projector": "resampler",
        "tokens": 6,
        "feature_dim": 40,
        "heads": 1,
        "depth": 4,
        "head_dim": 64,
    },
    "mlp": {"projector": "mlp", "tokens": 257, "feature_dim": 48},
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return randomised(UNet2DConditionModel(**UNET))


def adapter_of(projector: str, unet: UNet2DConditionModel) -> tuple[dict[str, Any], State]:
    """A random adapter for the UNet, its layers as diffusers lists them."""
    widths = [
        unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    config = PROJECTORS[projector] | {
        "cross_attention_dim": 32,
        "layers": {str(2 * i + 1): width for i, width in enumerate(widths)},
        "layer": None,
    }
    torch.manual_seed(1)
    return config, {name: torch.randn(shape) for name, shape in ip_adapter.expected(config).items()}


def nested(state: State) -> dict[str, State]:
    parts: dict[str, State] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    return parts


class Holder(IPAdapterMixin):
    """diffusers' own loader, around a UNet alone."""

    unet_name = "unet"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet


@pytest.mark.parametrize("projector", PROJECTORS)
def test_ip_adapter_layouts(projector: str, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    config, state = adapter_of(projector, unet)
    save_file(state, tmp_path / "flat.txt")
    torch.save(nested(state), tmp_path / "nested.safetensors")
    unet._load_ip_adapter_weights([nested(state)])
    torch.save(unet.state_dict(), tmp_path / "diffusers.safetensors")
    for name, layout in (("flat.txt", "original"), ("nested.safetensors", "original"), ("diffusers.safetensors",) * 2):
        info = formats.inspect(tmp_path / name)
        assert (info.kind, info.layout) == ("ip_adapter", layout.removesuffix(".safetensors"))
        assert info.config == config
        assert info.parameters == sum(value.numel() for value in state.values())
        found_config, found = formats.read(tmp_path / name, "ip_adapter")
        assert found_config == config
        assert_equal(found, state)


def test_ip_adapter_training_checkpoints(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    config, state = adapter_of("linear", unet)
    unet._load_ip_adapter_weights([nested(state)])
    inside = {f"unet.{n}": v for n, v in unet.state_dict().items() if not n.startswith("encoder_hid_proj")}
    # The original's processors hold one adapter, so their names carry no number.
    inside = {n.replace("_ip.0.", "_ip."): v for n, v in inside.items()}
    projector = {n.replace("image_proj.", "image_proj_model."): v for n, v in state.items() if "image_proj." in n}
    modules = {n.replace("ip_adapter.", "adapter_modules."): v for n, v in state.items() if "ip_adapter." in n}
    torch.save(projector | modules | inside, tmp_path / "pytorch_model.bin")
    save_file(projector | inside, tmp_path / "model.safetensors")  # without the shared names, as accelerate saves it
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert formats.inspect(tmp_path / name).layout == "training checkpoint"
        found_config, found = formats.read(tmp_path / name, "ip_adapter")
        assert found_config == config
        assert_equal(found, state)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_diffusers_loads_the_ip_adapter_we_write(
    projector: str, layout: str, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    config, state = adapter_of(projector, unet)
    file = formats.write(tmp_path / "ip", "ip_adapter", config, state, layout)
    assert file == tmp_path / "ip" / "ip_adapter.safetensors"
    Holder(unet).load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    torch.save(unet.state_dict(), tmp_path / "loaded")
    for path in (tmp_path / "loaded", file, file.parent):
        assert_equal(formats.read(path, "ip_adapter")[1], state)


def test_resampler_heads(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    config, state = adapter_of("resampler", unet)
    save_file(state, tmp_path / "plus")
    found = formats.read(tmp_path / "plus", "ip_adapter", heads=4)[0]
    assert (found["heads"], found["head_dim"]) == (4, 16)
    with pytest.raises(MahlstickError, match="heads="):
        formats.read(tmp_path / "plus", "ip_adapter", heads=7)
    formats.write(tmp_path / "kept.safetensors", "ip_adapter", config | {"heads": 4, "head_dim": 16}, state)
    kept = formats.read(tmp_path / "kept.safetensors", "ip_adapter")[0]
    assert (kept["heads"], kept["head_dim"]) == (4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ip_adapter.3.to_v_ip.weight"), r"1 missing \(ip_adapter.3.to_v_ip.weight\)"),
        (lambda s: s.pop("image_proj.norm.bias"), r"1 missing \(image_proj.norm.bias\)"),
        (lambda s: s.pop("image_proj.norm.weight"), r"lacks image_proj.norm.weight"),
        (lambda s: s.update({"ip_adapter.1.extra": torch.zeros(1)}), r"1 unexpected \(ip_adapter.1.extra\)"),
        (lambda s: s.update({"ip_adapter.3.to_k_ip.weight": torch.zeros(32, 5)}), r"\(32, 5\) instead of \(32, 32\)"),
        (lambda s: [s.pop(n) for n in list(s) if "ip_adapter" in n], r"lacks the attention weights"),
        (lambda s: [s.pop(n) for n in list(s) if "image_proj" in n], r"projector is none of"),
    ],
)
def test_ip_adapter_with_a_fault(
    change: Callable[[State], Any], message: str, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    state = adapter_of("linear", unet)[1]
    change(state)
    save_file(state, tmp_path / "ip")
    with pytest.raises(MahlstickError, match=rf"ip cannot be read: .*{message}"):
        formats.read(tmp_path / "ip", "ip_adapter")


def test_two_ip_adapters_in_one_unet_are_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    state = nested(adapter_of("linear", unet)[1])
    unet._load_ip_adapter_weights([state, state])
    torch.save(unet.state_dict(), tmp_path / "two")
    with pytest.raises(MahlstickError, match="2 IP-Adapters"):
        formats.read(tmp_path / "two", "ip_adapter")


# What else a user drops in ------------------------------------------------------------------------------------------


def lora_state() -> State:
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel(**UNET)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}


def zeros(*names: str) -> Callable[[], State]:
    return lambda: {name: torch.zeros(1) for name in names}


def state_of(class_name: str, **config: Any) -> Callable[[], State]:
    import diffusers

    return lambda: dict(getattr(diffusers, class_name)(**config).state_dict())


_SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
_DOWN = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
FOREIGN: dict[str, tuple[str, Callable[[], State]]] = {
    "t2i": ("t2i_adapter", state_of("T2IAdapter", channels=[32, 64], num_res_blocks=1)),
    "t2i original": ("t2i_adapter", zeros("conv_in.weight", "body.0.block1.weight")),
    "motion lora": (
        "motion_lora",
        zeros("down_blocks.0.motion_modules.0.temporal_transformer.processor.to_q_lora.down.weight"),
    ),
    "union": (
        "controlnet_union",
        state_of(
            "ControlNetUnionModel",
            **_SMALL,
            **_DOWN,
            attention_head_dim=4,
            conditioning_embedding_out_channels=(4, 8),
            num_trans_channel=32,
            num_trans_head=2,
            num_proj_channel=32,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48,
        ),
    ),
    "xs": (
        "controlnet_xs",
        state_of(
            "ControlNetXSAdapter",
            block_out_channels=(32, 64),
            base_block_out_channels=(32, 64),
            cross_attention_dim=32,
            num_attention_heads=2,
            **_DOWN,
        ),
    ),
    "flux controlnet": (
        "controlnet_transformer",
        state_of(
            "FluxControlNetModel",
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=[2, 2, 4],
        ),
    ),
    "sd3 controlnet": (
        "controlnet_transformer",
        state_of(
            "SD3ControlNetModel",
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            caption_projection_dim=16,
            pos_embed_max_size=4,
            sample_size=4,
        ),
    ),
    "control lora": (
        "control_lora",
        zeros("lora_controlnet", "input_blocks.1.0.in_layers.2.up", "zero_convs.0.0.bias"),
    ),
    "lllite": ("controlnet_lllite", zeros("lllite_unet_input_blocks_4_1.conditioning1.0.weight")),
    "lora peft": ("lora", lora_state),
    "lora kohya": ("lora", zeros("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight")),
    "lora processors": ("lora", zeros("unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight")),
    "faceid": ("ip_adapter_faceid", zeros("image_proj.proj.0.weight", "image_proj.norm.weight")),
    "faceid plus": ("ip_adapter_faceid", zeros("image_proj.perceiver_resampler.proj_in.weight")),
    "faceid lora": ("ip_adapter_faceid", zeros("image_proj.latents", "ip_adapter.0.to_q_lora.down.weight")),
    "base": ("base", zeros("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.bias")),
    "unet": ("unet", state_of("UNet2DConditionModel", **UNET)),
    "vae": ("vae", state_of("AutoencoderKL", block_out_channels=(32,), norm_num_groups=8)),
    "flux": ("transformer", zeros("double_blocks.0.img_attn.norm.key_norm.scale")),
    "clip": ("encoder", zeros("text_model.embeddings.position_embedding.weight")),
    "embedding": ("textual_inversion", zeros("<cat-toy>")),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_are_named(name: str, tmp_path: Path) -> None:
    kind, make = FOREIGN[name]
    path = tmp_path / "controlnet.safetensors"
    torch.save(make(), path)
    info = formats.inspect(path)
    assert (info.kind, info.config) == (kind, {})
    for ours in ("controlnet", "ip_adapter"):
        with pytest.raises(MahlstickError, match=r"controlnet.safetensors is an? .*, not an? \S+: .+\.$") as caught:
            formats.read(path, ours)
        assert "\n" not in str(caught.value)


def test_a_lora_is_sent_to_its_loader(tmp_path: Path) -> None:
    torch.save(lora_state(), tmp_path / "net")
    with pytest.raises(MahlstickError, match=r"is a LoRA, not a ControlNet: load it with pipe.load_lora_weights"):
        formats.read(tmp_path / "net", "controlnet")
    with pytest.raises(MahlstickError, match="is an IP-Adapter, not a ControlNet: load it with IPAdapter"):
        save_file(adapter_of("linear", UNet2DConditionModel(**UNET))[1], tmp_path / "ip")
        formats.read(tmp_path / "ip", "controlnet")


def test_unknown_layout_says_what_was_found_and_what_was_needed(tmp_path: Path) -> None:
    save_file({f"layer.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "net")
    for call in (lambda p: formats.read(p, "controlnet"), formats.inspect):
        with pytest.raises(MahlstickError, match=r"found layer.0, layer.1, layer.2, … 9 in all; .*control_model\.\*"):
            call(tmp_path / "net")


# Bad files ----------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("storage", ["torch", "old torch", "plain"])
def test_a_malicious_pickle_is_refused_and_never_run(storage: str, tmp_path: Path) -> None:
    path, target = tmp_path / "net.pth", tmp_path / "pwned"
    content = {"control_model.input_blocks.0.0.weight": Bomb(target)}
    if storage == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=storage == "torch")
    for call in (formats.inspect, lambda p: formats.read(p, "controlnet")):
        with pytest.raises(MahlstickError, match=r"net.pth was refused: .*pickle.*mkdir.*safetensors") as caught:
            call(path)
        assert "\n" not in str(caught.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is real
    assert target.is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"garbage " * 100, "is not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
        (b"\n <!DOCTYPE html><html>404</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(200), "is damaged or cut short"),
        (b"\x80\x02" + bytes(200), "is damaged or cut short|was refused"),
        ((2**60).to_bytes(8, "little") + b"{" + bytes(99), "is damaged or cut short"),
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(MahlstickError, match=rf"net.safetensors ({message})") as caught:
        formats.inspect(path)
    assert "\n" not in str(caught.value)


def test_a_header_whose_length_looks_like_a_web_page(net: ControlNetModel, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(original(net), path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    longer = whole[8:end].ljust(int.from_bytes(b" <\1", "little"))  # more spaces behind the header
    path.write_bytes(len(longer).to_bytes(8, "little") + longer + whole[end:])
    assert path.read_bytes()[:2] == b" <" and formats.inspect(path).kind == "controlnet"


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3)], ids=str)
def test_pickles_without_named_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net")
    with pytest.raises(MahlstickError, match="net holds no named tensors"):
        formats.inspect(tmp_path / "net")


@pytest.mark.parametrize("storage", ["safetensors", "pickle", "old pickle"])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.99])
def test_cut_short_files(storage: str, kept: float, net: ControlNetModel, tmp_path: Path) -> None:
    path = tmp_path / "net"
    SAVE[storage](original(net), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(MahlstickError, match=r"damaged or cut short|was refused"):
        formats.read(path, "controlnet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_named(value: float, dtype: torch.dtype, net: ControlNetModel, tmp_path: Path) -> None:
    state = {name: weights.to(dtype) for name, weights in original(net).items()}
    state["control_model.time_embed.2.bias"][3] = value
    save_file(state, tmp_path / "net")
    with pytest.raises(MahlstickError, match=r"NaN or infinite weights in 'control_model.time_embed.2.bias'"):
        formats.read(tmp_path / "net", "controlnet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("zero_convs.1.0.weight"), r"1 missing \(controlnet_down_blocks.1.weight\)"),
        (lambda s: s.update(surplus=torch.zeros(1)), r"1 unexpected \(surplus\)"),
        (lambda s: s.update({"middle_block_out.0.bias": torch.zeros(3)}), r"\(3,\) instead of \(64,\)"),
        (lambda s: s.pop("input_hint_block.0.weight"), r"lacks controlnet_cond_embedding.conv_in.weight"),
        (
            lambda s: [s.pop(n) for n in list(s) if n.startswith("middle_block.")],
            r"missing \(mid_block|unexpected|lacks",
        ),
    ],
)
def test_nets_with_a_fault(change: Callable[[State], Any], message: str, net: ControlNetModel, tmp_path: Path) -> None:
    state = original(net, "")
    change(state)
    save_file(state, tmp_path / "net")
    with pytest.raises(MahlstickError, match=rf"net cannot be read: .*({message})"):
        formats.read(tmp_path / "net", "controlnet")


def test_missing_paths_and_folders_without_weights(net: ControlNetModel, tmp_path: Path) -> None:
    with pytest.raises(MahlstickError, match=r"nothing.safetensors does not exist"):
        formats.inspect(tmp_path / "nothing.safetensors")
    with pytest.raises(MahlstickError, match=r"models/nothing.safetensors does not exist"):
        formats.inspect("models/nothing.safetensors")
    with pytest.raises(MahlstickError, match=r"is a folder without weights: looked for .safetensors"):
        formats.inspect(tmp_path)
    net.save_pretrained(tmp_path / "controlnet")
    with pytest.raises(MahlstickError, match=r"is a folder without weights: give one of its subfolders \(controlnet\)"):
        formats.inspect(tmp_path)
    for name in ("canny.safetensors", "depth.safetensors"):
        save_file(original(net), tmp_path / name)
    with pytest.raises(MahlstickError, match=r"several checkpoints \(canny.safetensors, depth.safetensors\)"):
        formats.inspect(tmp_path)


def test_folders_with_a_fault(net: ControlNetModel, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path, max_shard_size="400KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    shard = min(tmp_path.glob("*-of-*"))
    shard.rename(tmp_path / "away")
    with pytest.raises(MahlstickError, match=rf"not there \({shard.name}\)"):
        formats.inspect(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../away"}}))
    with pytest.raises(MahlstickError, match="outside its own folder"):
        formats.inspect(tmp_path)
    index.write_text("{")
    with pytest.raises(MahlstickError, match="not an index"):
        formats.inspect(tmp_path)
    index.unlink()
    net.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MahlstickError, match=r"config.json is not valid JSON"):
        formats.inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel", "cross_attention_dim": 1024}')
    with pytest.raises(MahlstickError, match=r"do not match its config: .*768\) instead of .*1024"):
        formats.read(tmp_path, "controlnet")
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel", "down_block_types": ["Nonsense"]}')
    with pytest.raises(MahlstickError, match="config makes no ControlNet"):
        formats.read(tmp_path, "controlnet")


def test_hub_ids_come_from_the_cache_when_offline(
    net: ControlNetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, revision = tmp_path / "models--some-one--some-net", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    net.save_pretrained(repository / "snapshots" / revision)
    (repository / "snapshots" / revision / "sub").mkdir()
    save_file(original(net), repository / "snapshots" / revision / "sub" / "net.safetensors")
    for name in ("some-one/some-net", "some-one/some-net/sub", "some-one/some-net/sub/net.safetensors"):
        assert_equal(formats.read(name, "controlnet")[1], net.state_dict())
    for name in ("some-one/other", "some-one/some-net/sub/other.bin"):
        with pytest.raises(MahlstickError, match="the hub did not give it"):
            formats.inspect(name)


# Does it fit --------------------------------------------------------------------------------------------------------

_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "uneven": {
        "block_out_channels": (32, 64),
        "layers_per_block": (1, 2),
        "transformer_layers_per_block": ((1,), (2, 1)),
        "reverse_transformer_layers_per_block": ((2, 2, 1), (1, 2)),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}


def meta_unet(name: str, **config: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**_UNETS[name] | config)


@pytest.mark.parametrize("name", _UNETS)
def test_cross_attention_widths_are_the_live_unets(name: str) -> None:
    unet = meta_unet(name)
    live = [
        unet.get_submodule(p.removesuffix(".processor")).to_k.out_features for p in unet.attn_processors if "attn2" in p
    ]
    assert formats.cross_attention_widths(unet.config) == live


def test_fit_is_judged_from_configs_alone() -> None:
    sd1, sdxl, inpaint = meta_unet("sd1"), meta_unet("sdxl"), meta_unet("sd1", in_channels=9)
    with torch.device("meta"):
        nets = {name: ControlNetModel.from_unet(unet) for name, unet in (("sd1", sd1), ("sdxl", sdxl))}
    configs = {name: plain(net.config) for name, net in nets.items()}  # lists, as a config.json has them
    formats.require_fit("controlnet", configs["sd1"], sd1.config)
    formats.require_fit("controlnet", configs["sd1"], inpaint.config)
    formats.require_fit("controlnet", configs["sdxl"], sdxl.config)
    with pytest.raises(MahlstickError, match=r"made for SDXL \(cross-attention 2048\), the UNet is SD 1.x .*768\)"):
        formats.require_fit("controlnet", configs["sdxl"], sd1.config)
    with pytest.raises(MahlstickError, match=r"made for SD 1.x .*, the UNet is SDXL .*block_out_channels"):
        formats.require_fit("controlnet", configs["sd1"], sdxl.config)
    with pytest.raises(MahlstickError, match=r"in_channels \(9 and 4\)"):
        formats.require_fit("controlnet", configs["sd1"] | {"in_channels": 9}, sd1.config)

    def layers(unet: UNet2DConditionModel) -> dict[str, int]:
        return {str(2 * i + 1): width for i, width in enumerate(formats.cross_attention_widths(unet.config))}

    ip = {"cross_attention_dim": 768, "layers": layers(sd1)}
    formats.require_fit("ip_adapter", ip, inpaint.config)
    with pytest.raises(MahlstickError, match=r"this IP-Adapter was made for SD 1.x .*, the UNet is SDXL"):
        formats.require_fit("ip_adapter", ip, sdxl.config)
    with pytest.raises(MahlstickError, match=r"number of cross-attention layers \(15 and 16\)"):
        formats.require_fit("ip_adapter", ip | {"layers": dict(list(ip["layers"].items())[1:])}, sd1.config)
    with pytest.raises(MahlstickError, match="widths"):
        formats.require_fit("ip_adapter", ip | {"layers": dict.fromkeys(ip["layers"], 320)}, sd1.config)


# The original repositories' numbers ---------------------------------------------------------------------------------


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@needs_goldens
@pytest.mark.parametrize(("name", "heads", "tolerance"), [("cldm_small", 4, 1e-4), ("cldm_family", None, 1e-3)])
def test_converted_originals_compute_what_the_originals_did(name: str, heads: int | None, tolerance: float) -> None:
    weights, io = GOLDENS / f"{name}.weights.safetensors", load_file(GOLDENS / f"{name}.io.safetensors")
    config, state = formats.read(weights, "controlnet", **({"heads": heads} if heads else {}))
    net = ControlNetModel(**config).eval()
    net.load_state_dict(state)

    shared = {n: v for n, v in config.items() if n in python_inspect.signature(UNet2DConditionModel).parameters}
    ups = [t.replace("Down", "Up") for t in reversed(config["down_block_types"])]
    unet = UNet2DConditionModel(**shared | {"up_block_types": ups}).eval()
    unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(weights), dict(unet.config)))

    with torch.no_grad():
        inputs = (io["x"], io["timesteps"], io["context"])
        down, mid = net(*inputs, controlnet_cond=io["hint"], return_dict=False)
        plain_eps = unet(*inputs).sample
        eps = unet(*inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    wanted = [io[f"control_{i}"] for i in range(len(down) + 1)]
    assert max(relative(found, want) for found, want in zip((*down, mid), wanted, strict=True)) <= tolerance
    assert relative(plain_eps, io["eps_plain"]) <= tolerance
    assert relative(eps, io["eps_control"]) <= tolerance
    assert relative(eps, io["eps_plain"]) > 10 * tolerance


@needs_goldens
def test_ip_adapter_pickle_equals_safetensors() -> None:
    pickled = formats.read(GOLDENS / "ipa_base.bin", "ip_adapter")
    flat = formats.read(GOLDENS / "ipa_base.safetensors", "ip_adapter")
    assert pickled[0] == flat[0]
    assert_equal(pickled[1], flat[1])
    with safe_open(GOLDENS / "ipa_unet.safetensors", "pt") as handle:
        unet_config = json.loads(handle.metadata()["config"])
    with torch.device("meta"):
        formats.require_fit("ip_adapter", flat[0], UNet2DConditionModel(**unet_config).config)


@needs_goldens
def test_ip_adapter_plus_needs_its_heads() -> None:
    with pytest.raises(MahlstickError, match="heads="):
        formats.read(GOLDENS / "ipa_plus.safetensors", "ip_adapter")
    config, _ = formats.read(GOLDENS / "ipa_plus.safetensors", "ip_adapter", heads=4)
    assert (config["heads"], config["head_dim"], config["tokens"], config["depth"]) == (4, 8, 6, 2)
    assert formats.inspect(GOLDENS / "ipa_plus.safetensors").config["heads"] is None


@needs_goldens
def test_motion_module_is_named() -> None:
    assert formats.inspect(GOLDENS / "anim_v2.safetensors").kind == "motion_adapter"


# load_adapter -------------------------------------------------------------------------------------------------------


def test_load_adapter_takes_whichever_kind_the_file_is(
    net: ControlNetModel, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    import mahlstick as ms

    save_file(original(net), tmp_path / "a")
    save_file(adapter_of("linear", unet)[1], tmp_path / "b")
    loaded = ms.load_adapter(tmp_path / "a", heads=4)
    assert isinstance(loaded, ms.ControlNet)
    assert loaded.config["attention_head_dim"] == 4
    assert_equal(dict(loaded.state_dict()), net.state_dict())
    assert isinstance(ms.load_adapter(tmp_path / "b"), ms.IPAdapter)
    torch.save(lora_state(), tmp_path / "c")
    with pytest.raises(MahlstickError, match=r"c is a LoRA: load it with pipe.load_lora_weights\."):
        ms.load_adapter(tmp_path / "c")
