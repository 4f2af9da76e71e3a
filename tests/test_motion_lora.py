"""Motion LoRA: what diffusers computes with it, every name that its halves go by, and files that do not apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from benchmarks.fidelity import error, video_pipeline

FRAMES, RANK = 4, 3
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def module() -> ms.MotionAdapter:
    return tiny.motion_adapter(tiny.unet("sd1"))


def published(module: ms.MotionAdapter, prefix: str = "") -> State:
    """Random pairs for every attention, named as in v2_lora_PanLeft.ckpt."""
    torch.manual_seed(8)
    state: State = {}
    for name, weight in module.state_dict().items():
        if ".attn" not in name or not name.endswith("weight"):
            continue
        place, _, layer = name.removesuffix(".weight").partition(".transformer_blocks.0.")
        attention, _, projection = layer.partition(".")
        block = f"{place}.temporal_transformer.transformer_blocks.0.attention_blocks.{int(attention[-1]) - 1}"
        pair = f"{prefix}{block}.processor.{projection.removesuffix('.0')}_lora"
        out, into = weight.shape
        state[f"{pair}.down.weight"] = 0.3 * torch.randn(RANK, into)
        state[f"{pair}.up.weight"] = 0.3 * torch.randn(out, RANK)
    return state


def in_diffusers(state: State) -> State:
    """Under the names of the published files that diffusers has converted."""
    names = {".temporal_transformer": "", ".attention_blocks.0": ".attn1", ".attention_blocks.1": ".attn2"}
    renamed = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[f"unet.{name}"] = value
    return renamed


def clip() -> tuple[State, State]:
    """One call of a 2-D UNet with the frames in the batch, and the same of diffusers' UNetMotionModel."""
    inputs = tiny.unet_inputs("sd1", batch=FRAMES)
    inputs["encoder_hidden_states"][:] = inputs["encoder_hidden_states"][:1]
    return inputs, inputs | {"sample": inputs["sample"].transpose(0, 1)[None]}


# parity


@torch.no_grad()
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_diffusers_loads_the_same(layout: str, module: ms.MotionAdapter, tmp_path: Path) -> None:
    state = published(module, "module.")
    converted = in_diffusers(published(module))
    save_file(converted, tmp_path / "converted.safetensors")
    if layout == "original":
        torch.save({"state_dict": state, "global_step": 7}, tmp_path / "lora")
    else:
        save_file(converted, tmp_path / "lora")
    video = video_pipeline("AnimateDiffPipeline", "sd1", module)
    video.load_lora_weights(tmp_path, weight_name="converted.safetensors", adapter_name="pan")
    video.set_adapters(["pan"], [0.7])

    unet = tiny.unet("sd1")
    inputs, as_video = clip()
    wanted = video.unet(**as_video).sample[0].transpose(0, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    moved = module.with_lora(tmp_path / "lora", scale=0.7)
    with ms.attach(unet, ms.Motion(moved)):
        found = unet(**inputs).sample
    with ms.attach(unet, ms.Motion(module)):
        plain = unet(**inputs).sample
    assert error(found, wanted) < 1e-5 < 1e-2 < error(plain, wanted)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert moved.config == module.config
    pointers = {value.data_ptr() for value in module.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in moved.state_dict().values()}, "nothing is shared"


@torch.no_grad()
def test_what_peft_trains_and_diffusers_saves(module: ms.MotionAdapter, tmp_path: Path) -> None:
    """Feed-forwards too, and an alpha that is only in the file's metadata."""
    from peft import LoraConfig, get_peft_model_state_dict

    video = video_pipeline("AnimateDiffPipeline", "sd1", module)
    layers = r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"
    config = LoraConfig(r=RANK, lora_alpha=2, target_modules=layers)
    video.unet.add_adapter(config)
    torch.manual_seed(9)
    for name, parameter in video.unet.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter))
    settings = {name: value for name, value in config.to_dict().items() if isinstance(value, (int, str))}
    video.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=get_peft_model_state_dict(video.unet),
        unet_lora_adapter_metadata=settings,
    )
    unet = tiny.unet("sd1")
    inputs, as_video = clip()
    with ms.attach(unet, ms.Motion(module.with_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))):
        found = unet(**inputs).sample
    assert error(found, video.unet(**as_video).sample[0].transpose(0, 1)) < 1e-5


# names and doses


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_names_of_the_halves_and_alpha(
    down: str, up: str, alpha: float | None, module: ms.MotionAdapter, tmp_path: Path
) -> None:
    name = "mid_block.motion_modules.0.transformer_blocks.0.attn2.to_out.0"
    weights = module.state_dict()
    weight = weights[f"{name}.weight"]
    low, high = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)
    state = {f"{name}.{down}": low, f"{name}.{up}": high}
    if alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "lora")
    found = module.with_lora(tmp_path / "lora", scale=-2.0).state_dict()
    factor = 1.0 if alpha is None else alpha / RANK
    torch.testing.assert_close(found.pop(f"{name}.weight"), weight - 2.0 * factor * high @ low)
    assert all(torch.equal(value, weights[other]) for other, value in found.items())


def test_two_in_turn_and_back_and_halves(module: ms.MotionAdapter, tmp_path: Path) -> None:
    save_file(published(module), tmp_path / "lora")
    there_and_back = module.with_lora(tmp_path / "lora", 0.5).with_lora(tmp_path / "lora", -0.5)
    torch.testing.assert_close(there_and_back.state_dict(), module.state_dict(), atol=1e-5, rtol=1e-5)
    half = ms.MotionAdapter.from_pretrained(module.save_pretrained(tmp_path / "module"), dtype=torch.float16)
    assert {value.dtype for value in half.with_lora(tmp_path / "lora").state_dict().values()} == {torch.float16}
    save_file({name: value.half() for name, value in published(module).items()}, tmp_path / "half")
    assert module.with_lora(tmp_path / "half").dtype == torch.float32


# what it is, and what it is not


def test_it_is_recognised_and_routed(module: ms.MotionAdapter, tmp_path: Path) -> None:
    torch.save({"state_dict": published(module, "module.")}, tmp_path / "pan.ckpt")
    save_file(in_diffusers(published(module)), tmp_path / "pan.safetensors")
    for name, layout in (("pan.ckpt", "original"), ("pan.safetensors", "diffusers")):
        info = ms.inspect(tmp_path / name)
        assert (info.kind, info.layout) == ("motion_lora", layout)
        way_out = rf"{name} is a motion LoRA: merge it into a motion module with module\.with_lora\(path\)\.$"
        with pytest.raises(ms.MahlstickError, match=way_out):
            ms.load_adapter(tmp_path / name)
        with pytest.raises(ms.MahlstickError, match="is a motion LoRA, not a motion module: merge it"):
            ms.MotionAdapter.from_pretrained(tmp_path / name)


@torch.no_grad()
def test_a_domain_adapter_is_a_lora_of_the_unet(module: ms.MotionAdapter, tmp_path: Path) -> None:
    """AnimateDiff's v3 adapter, under its own names and those that diffusers converts it to."""
    unet = tiny.unet("sd1")
    state: State = {}
    for name, weight in unet.state_dict().items():
        if name.endswith(".attn1.to_q.weight"):
            pair = name.replace("to_q.weight", "processor.to_q_lora")
            out, into = weight.shape
            state |= {f"{pair}.down.weight": torch.randn(RANK, into), f"{pair}.up.weight": torch.randn(out, RANK)}
    save_file(state, tmp_path / "v3_adapter")
    save_file({f"unet.{name}": value for name, value in state.items()}, tmp_path / "converted")

    assert ms.inspect(tmp_path / "converted").note == "a LoRA: load it with pipe.load_lora_weights"
    note = ms.inspect(tmp_path / "v3_adapter").note
    assert ms.inspect(tmp_path / "v3_adapter").kind == "lora"
    assert note.endswith("load its weights with pipe.unet.load_lora_adapter(weights, prefix=None)")
    inputs = tiny.unet_inputs("sd1")
    plain = unet(**inputs).sample
    unet.load_lora_adapter(state, prefix=None)
    assert not torch.allclose(unet(**inputs).sample, plain), "the way out is one"

    for name in ("v3_adapter", "converted"):
        with pytest.raises(ms.MahlstickError, match=rf"{name} is a LoRA.*, not a motion LoRA: load it"):
            module.with_lora(tmp_path / name)


def test_files_that_do_not_apply_are_refused(module: ms.MotionAdapter, tmp_path: Path) -> None:
    state = published(module)
    first = next(iter(state))

    def refused(changed: State, told: str, **metadata: str) -> None:
        save_file(changed, tmp_path / "lora", metadata=metadata or None)
        with pytest.raises(ms.MahlstickError, match=told) as caught:
            module.with_lora(tmp_path / "lora")
        assert str(tmp_path / "lora") in str(caught.value) and "\n" not in str(caught.value)

    elsewhere = {name.replace("down_blocks.0", "down_blocks.7"): value for name, value in state.items()}
    refused(
        elsewhere,
        r"lora: 16 of its 168 changes apply to nothing in this motion module, down_blocks\.7\.motion.* first:",
    )
    nowhere = {name.replace("_blocks.", "_blocks.9"): value for name, value in state.items() if "mid" not in name}
    refused(nowhere, r"lora: 160 of its 160 changes apply to nothing .*down_blocks\.90\..* first: use the module")
    spatial = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(RANK, 8)}
    spatial |= {name.replace("lora_A", "lora_B"): torch.ones(8, RANK) for name in spatial}
    refused(state | spatial, r"lora: 1 of its 169 changes .*unet\.down_blocks\.0\.attentions\.0.*lora_A.weight first")
    wide = {name: value.repeat(1, 2) if "down.weight" in name else value for name, value in state.items()}
    refused(wide, r"down\.weight changes a weight \(8, 16\), and this motion module's is \(8, 8\)")
    refused({k: v for k, v in state.items() if k != first}, r"up\.weight has no other half")
    refused(state | {first: torch.ones(RANK + 1, 8)}, r"down\.weight \(4, 8\) and .* \(8, 3\) are no low-rank pair")
    refused(state | {"mid_block.motion_modules.0.lora_note": torch.ones(1)}, "lora_note is no part of a low-rank pair")
    refused(state, "use_rslora, which is not supported", lora_adapter_metadata='{"unet.use_rslora": true}')
    with pytest.raises(ms.MahlstickError, match="is a motion module, not a motion LoRA: load it with MotionAdapter"):
        module.with_lora(module.save_pretrained(tmp_path / "module"))
    with pytest.raises(ms.MahlstickError, match="scale must be a number"):
        module.with_lora(tmp_path / "lora", scale=float("nan"))
