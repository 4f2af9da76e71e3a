"""Units beside whatever else people do to a pipeline: offload, slicing, compilation, LoRA, PAG, other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import mahlstick as ms
from tests import zoo

PLAIN = "StableDiffusionPipeline"
Change = Callable[[Any], None]


@pytest.fixture
def pipe() -> Iterator[Any]:
    zoo.renew()
    yield zoo.build(PLAIN)
    zoo.renew()


def units(pipe: Any) -> list[Any]:
    return [zoo.control(pipe.unet), zoo.image_prompt(pipe.unet)]


def generate(pipe: Any, *units: Any, name: str = PLAIN) -> np.ndarray:
    with ms.attach(pipe, *units):
        return zoo.generate(pipe, name)


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """What enable_sequential_cpu_offload does to the UNet; on a CPU accelerate fails on the text encoder."""
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def vae_tiling(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()


def attention_slicing(pipe: Any) -> None:
    pipe.enable_attention_slicing(1)


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def fused_projections(pipe: Any) -> None:
    pipe.fuse_qkv_projections()


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


CHANGES = [model_offload, sequential_offload, vae_tiling, attention_slicing, fused_projections, channels_last]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_changes_no_picture_changes_none_with_units(pipe: Any, change: Change, when: str) -> None:
    clipped = units(pipe)
    plain, expected = generate(pipe), generate(pipe, *clipped)
    assert np.abs(plain - expected).max() > 1e-2
    if when == "before":
        change(pipe)
    with ms.attach(pipe, *clipped):
        if when == "after":
            change(pipe)
        assert_close(zoo.generate(pipe, PLAIN), expected)
    assert_close(zoo.generate(pipe, PLAIN), plain)


def test_free_u_acts_beside_units(pipe: Any) -> None:
    clipped = units(pipe)
    freeu(pipe)
    before = generate(pipe)
    with ms.attach(pipe, *clipped):
        both = zoo.generate(pipe, PLAIN)
        pipe.disable_freeu()
        alone = zoo.generate(pipe, PLAIN)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert np.array_equal(zoo.generate(pipe, PLAIN), both)
    assert not np.array_equal(both, alone)
    assert np.array_equal(zoo.generate(pipe, PLAIN), before)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA file as people publish it, with an effect."""
    from diffusers import StableDiffusionPipeline

    unet = zoo.unet()
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    return tmp_path


def test_lora_before_and_after(pipe: Any, lora: Path) -> None:
    """Loaded under attached units, or before them; taken off before they are, or after."""
    clipped = units(pipe)
    plain, with_units = generate(pipe), generate(pipe, *clipped)
    pipe.load_lora_weights(lora)
    with_lora, with_both = generate(pipe), generate(pipe, *clipped)
    assert len({picture.tobytes() for picture in (plain, with_units, with_lora, with_both)}) == 4
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe), plain)

    with ms.attach(pipe, *clipped):
        pipe.load_lora_weights(lora)
        assert_close(zoo.generate(pipe, PLAIN), with_both)
        pipe.unload_lora_weights()
        assert_close(zoo.generate(pipe, PLAIN), with_units)
        pipe.load_lora_weights(lora)
    assert_close(zoo.generate(pipe, PLAIN), with_lora)
    pipe.unload_lora_weights()
    assert np.array_equal(zoo.generate(pipe, PLAIN), plain)


def test_lora_fused(pipe: Any, lora: Path) -> None:
    clipped = units(pipe)
    plain = generate(pipe)
    pipe.load_lora_weights(lora)
    with_both = generate(pipe, *clipped)
    with ms.attach(pipe, *clipped):
        pipe.fuse_lora()
        assert_close(zoo.generate(pipe, PLAIN), with_both, 1e-4)
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_close(zoo.generate(pipe, PLAIN), plain, 1e-4)


def test_perturbed_attention_guidance_from_pipe(pipe: Any) -> None:
    """A PAG pipeline made from a plain one shares its UNet and sets processors while it runs."""
    from diffusers import StableDiffusionPAGPipeline

    guided = StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"])
    guided.set_progress_bar_config(disable=True)
    name = "StableDiffusionPAGPipeline"
    clipped = units(pipe)
    plain, before = generate(guided, name=name), generate(pipe, *clipped)
    with ms.attach(guided, *clipped):
        both = zoo.generate(guided, name)
    weak = zoo.control(pipe.unet)
    weak.scale = 0.5
    assert not np.array_equal(plain, both)
    assert not np.array_equal(both, generate(guided, weak, clipped[1], name=name))
    assert np.array_equal(generate(guided, name=name), plain)
    assert np.array_equal(generate(pipe, *clipped), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe: Any, dtype: torch.dtype) -> None:
    """The UNet keeps its dtype, and the adapters, which are wider, keep theirs."""
    clipped = units(pipe)
    expected = generate(pipe, *clipped)
    pipe.to(dtype)
    plain = generate(pipe)
    half = generate(pipe, *clipped)
    assert np.isfinite(half).all()
    assert np.abs(half - plain).max() > 1e-2
    assert np.abs(half - expected).mean() < 0.05
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {dtype}
    assert np.array_equal(generate(pipe), plain)


def test_dtype_change_under_attached_units(pipe: Any) -> None:
    clipped = units(pipe)
    expected = generate(pipe, *clipped)
    with ms.attach(pipe, *clipped):
        pipe.to(torch.bfloat16)
        assert np.isfinite(zoo.generate(pipe, PLAIN)).all()
    pipe.to(torch.float32)
    assert np.abs(generate(pipe, *clipped) - expected).mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_on_a_full_precision_unet(pipe: Any, dtype: torch.dtype) -> None:
    """Stored in half precision, computed in full: the same as if they had been loaded in full."""
    clipped = units(pipe)
    adapters = clipped[0].net, clipped[1].adapter
    for adapter in adapters:
        adapter.to(dtype).float()
    expected = generate(pipe, *clipped)
    for adapter in adapters:
        adapter.to(dtype)
    assert np.array_equal(generate(pipe, *clipped), expected)
    assert {adapter.dtype for adapter in adapters} == {torch.float32}


def test_half_precision_adapters_under_autocast(pipe: Any) -> None:
    clipped = units(pipe)
    expected = generate(pipe, *clipped)
    clipped[0].net.half()
    clipped[1].adapter.half()
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(pipe, *clipped)
    assert np.abs(found - expected).mean() < 0.05


# Compiled: one UNet call, on as few blocks as there can be, for compiling takes long.

SMALL = dict(
    block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
)


@pytest.fixture
def unet() -> Iterator[Any]:
    torch._dynamo.reset()  # its caches are global
    yield zoo.unet(**SMALL)
    torch._dynamo.reset()


def call(unet: Any) -> torch.Tensor:
    with torch.no_grad():
        return unet(zoo.embeddings(0, 2, 4, 16, 16), 500, zoo.embeddings(1, 2, 77, zoo.DIM)).sample


def wrapped(unet: Any) -> Any:
    return torch.compile(unet, backend="eager")


def in_place(unet: Any) -> Any:
    unet.compile(backend="eager")
    return unet


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_attached_then_compiled(unet: Any, compiled: Callable[[Any], Any]) -> None:
    plain = call(unet)
    with ms.attach(unet, zoo.control(unet), zoo.image_prompt(unet)):
        expected = call(unet)
        fast = compiled(unet)
        assert torch.allclose(call(fast), expected, atol=1e-5)
    assert torch.allclose(call(fast), plain, atol=1e-5)


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_attached_after_it_has_run_compiled(unet: Any, compiled: Callable[[Any], Any]) -> None:
    clipped = [zoo.control(unet), zoo.image_prompt(unet)]
    plain = call(unet)
    with ms.attach(unet, *clipped):
        expected = call(unet)
    fast = compiled(unet)
    assert torch.allclose(call(fast), plain, atol=1e-5)
    with ms.attach(fast, *clipped):
        assert torch.allclose(call(fast), expected, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.allclose(call(fast), plain, atol=1e-5)


def test_compiled_in_a_pipeline(unet: Any, pipe: Any) -> None:
    pipe.unet = unet
    clipped = units(pipe)
    plain, expected = generate(pipe), generate(pipe, *clipped)
    pipe.unet = torch.compile(unet, backend="eager")
    with ms.attach(pipe, *clipped):
        assert_close(zoo.generate(pipe, PLAIN), expected)
    assert_close(zoo.generate(pipe, PLAIN), plain)


def test_compiled_without_a_graph_break(unet: Any) -> None:
    with ms.attach(unet, zoo.control(unet), zoo.image_prompt(unet)):
        expected = call(unet)
        assert torch.allclose(call(torch.compile(unet, backend="eager", fullgraph=True)), expected, atol=1e-5)


def test_compiled_by_inductor(unet: Any) -> None:
    with ms.attach(unet, zoo.control(unet), zoo.image_prompt(unet)):
        expected = call(unet)
        assert torch.allclose(call(torch.compile(unet)), expected, atol=1e-4)
