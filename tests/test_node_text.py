"""Text and conditioning nodes: ComfyUI's weights, chunks and options, and diffusers' numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.tiny import text_encoder, tokenizer
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders, text
from mahlstick.nodes.builtin import conditioning as nodes
from mahlstick.nodes.builtin.loaders import embedded_pipeline
from mahlstick.nodes.values import Clip
from tests import tiny

BEGIN, END, PAD = 512, 513, 513


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip((tokenizer(),), (text_encoder(),))


@pytest.fixture(scope="module")
def xl() -> Clip:
    return Clip((tokenizer(), padded_with(7)), (text_encoder(), text_encoder(projection=True)))


def padded_with(token: int) -> Any:
    """A tokenizer that pads with another token than the end, as XL's second does."""
    changed = copy.deepcopy(tokenizer())
    changed.pad_token = changed.convert_ids_to_tokens(token)
    assert changed.pad_token_id == token
    return changed


def ids(words: str) -> list[int]:
    return list(tokenizer()(words).input_ids[1:-1])


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a red fox", [("a red fox", 1.0)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("(a)((b))", [("a", 1.1), ("b", 1.1 * 1.1)]),
        ("((a:1.5) b:1.2)", [("a", 1.5), (" b", 1.2)]),  # the inner number stands for itself
        ("((a) b:1.2)", [("a", 1.2 * 1.1), (" b", 1.2)]),
        ("(a:b) (:2) (c: 0.5 )", [("a:b", 1.1), (" ", 1.0), (":2", 1.1), (" ", 1.0), ("c", 0.5)]),
        (r"\(a\) (\(b\):2)", [("(a) ", 1.0), ("(b)", 2.0)]),
        ("a) (b:2)", [("a) (b:2)", 1.0)]),  # after a bracket too many, none counts
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
        ("(a:-1) BREAK", [("a", -1.0), (" BREAK", 1.0)]),
        ("", []),
    ],
)
def test_brackets_weigh_as_in_comfyui(prompt: str, segments: list[tuple[str, float]]) -> None:
    assert text.weighted(prompt) == [(words, pytest.approx(weight)) for words, weight in segments]


def test_brackets_that_nest_too_deep() -> None:
    assert text.weighted("(" * 100 + "a" + ")" * 100) == [("a", pytest.approx(1.1**100))]
    with pytest.raises(MahlstickError, match="more than 100 brackets in one another"):
        text.weighted("(" * 9999 + "a" + ")" * 9999)


def test_a_plain_prompt_is_encoded_as_diffusers_does() -> None:
    pipe = embedded_pipeline()
    found, _ = text.encode(Clip((pipe.tokenizer,), (pipe.text_encoder,)), "a red circle on a blue ground")
    assert torch.equal(found, pipe.encode_prompt("a red circle on a blue ground", "cpu", 1, False)[0])
    pipe = tiny.sdxl()
    pipe.tokenizer_2 = padded_with(7)
    clip = Clip((pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2))
    wanted = pipe.encode_prompt("a fox", device="cpu", do_classifier_free_guidance=False)
    found, pooled = text.encode(clip, "a fox")
    assert torch.equal(found, wanted[0]) and torch.equal(pooled, wanted[2])


@torch.no_grad()
def reference(encoder: Any, chunks: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """Every token by itself: (z - z_empty) · w + z_empty."""
    empty = encoder(torch.tensor([[BEGIN, END] + [PAD] * 75])).last_hidden_state[0]
    rows = []
    for chunk in chunks:
        states = encoder(torch.tensor([[token for token, _ in chunk]])).last_hidden_state[0]
        for place, (_, weight) in enumerate(chunk):
            rows.append((states[place] - empty[place]) * weight + empty[place])
    return torch.stack(rows)[None]


def test_weights_and_chunks_as_in_comfyui(clip: Clip) -> None:
    # 70 tokens that may be broken anywhere, then 4 and 3 that stay together: the 3 no longer fit 75.
    long, four, three = "a" * 70, "bbbb", "ccc"
    found, pooled = text.encode(clip, f"{long} ({four}:0.4) ({three}:1.7)")
    first = [(token, 1.0) for token in ids(long)] + [(token, 0.4) for token in ids(four)]
    second = [(token, 1.7) for token in ids(three)]
    assert len(first) == 74
    chunks = [
        [(BEGIN, 1.0), *first, (END, 1.0), (PAD, 1.0)],
        [(BEGIN, 1.0), *second, (END, 1.0), *[(PAD, 1.0)] * 72],
    ]
    wanted = reference(clip.encoders[0], chunks)
    assert found.shape == (1, 154, 32)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[:, 1:70], found[:, 78:147], atol=0.1)
    with torch.no_grad():
        plain = clip.encoders[0](torch.tensor([[token for token, _ in chunks[0]]]))
    torch.testing.assert_close(pooled, plain.pooler_output)


def test_a_long_run_is_broken_where_the_chunk_ends(clip: Clip) -> None:
    [chunks] = text.tokenize(clip, "a" * 160)
    assert [len(chunk) for chunk in chunks] == [77] * 3
    assert all(chunk[0] == (BEGIN, 1.0) for chunk in chunks)
    assert [[token for token, _ in chunk].index(END) for chunk in chunks] == [76, 76, 11]


def test_empty_places_of_the_second_encoder_are_its_own_padding(xl: Clip) -> None:
    first, second = text.tokenize(xl, "a")
    assert {token for token, _ in first[0][3:]} == {PAD}
    assert {token for token, _ in second[0][3:]} == {7}


def test_clip_skip(clip: Clip, xl: Clip) -> None:
    encoder = clip.encoders[0]
    with torch.no_grad():
        padded = tokenizer()("a fox", padding="max_length", return_tensors="pt").input_ids
        wanted = encoder(padded, output_hidden_states=True)
        normed = encoder.final_layer_norm(wanted.hidden_states[-2])

    def encoded(given: Clip, layer: int) -> Tensor:
        return text.encode(nodes.CLIPSetLastLayer(clip=given, stop_at_clip_layer=layer)[0], "a fox")[0]

    assert torch.equal(encoded(clip, -2), normed)
    assert torch.equal(encoded(clip, -1), wanted.last_hidden_state)
    assert torch.equal(encoded(clip, -3), wanted.last_hidden_state)  # it has two layers
    assert torch.equal(encoded(xl, -1)[..., :32], wanted.hidden_states[-1])  # XL's are not normed
    assert clip.layer is None


@pytest.mark.parametrize(("layers", "layer", "read"), [(23, None, -1), (23, -2, -1), (23, -5, -4), (24, None, -2)])
def test_stable_diffusion_2_counts_the_layer_that_diffusers_leaves_out(layers: int, layer: Any, read: int) -> None:
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16))
    assert text._layer(Clip((tokenizer(),), (encoder,), layer), encoder) == read


def test_textual_inversion(clip: Clip, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.manual_seed(0))
    (tmp_path / "embeddings" / "mine").mkdir(parents=True)
    save_file({"wide": torch.zeros(1, 48), "emb_params": vectors}, tmp_path / "embeddings" / "mine" / "cat.safetensors")
    wider = copy.deepcopy(clip.encoders[0])
    wider.resize_token_embeddings(516, mean_resizing=False)
    wider.get_input_embeddings().weight.data[514:] = vectors
    with folders.using(folders.Folders(models=tmp_path)):
        found, _ = text.encode(clip, "a embedding:cat, b")
        with pytest.warns(UserWarning, match="embedding:dog is left out: there is no such file below"):
            missing, _ = text.encode(clip, "a embedding:dog, b")
        save_file({"emb_params": torch.zeros(1, 48)}, tmp_path / "embeddings" / "mine" / "cat.safetensors")
        with pytest.warns(UserWarning, match="embedding:cat is left out: .* another text encoder"):
            text.encode(clip, "a embedding:cat, b")
    tokens = [BEGIN, *ids("a"), 514, 515, *ids(", b"), END]
    with torch.no_grad():
        wanted = wider(torch.tensor([tokens + [PAD] * (77 - len(tokens))])).last_hidden_state
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(missing, text.encode(clip, "a , b")[0])
    assert not clip.encoders[0].get_input_embeddings()._forward_hooks


def test_text_for_each_encoder_of_xl(clip: Clip, xl: Clip) -> None:
    sizes = {"width": 640, "height": 512, "crop_w": 1, "crop_h": 2, "target_width": 768, "target_height": 896}
    [[states, options]] = nodes.CLIPTextEncodeSDXL(clip=xl, text_g="g", text_l="l" * 80, **sizes)[0]
    assert {key: options[key] for key in sizes} == sizes
    assert states.shape == (1, 154, 64)
    torch.testing.assert_close(states[..., :32], text.encode(xl, "l" * 80)[0][..., :32])
    second = torch.cat([text.encode(xl, each)[0][..., 32:] for each in ("g", "")], dim=1)
    torch.testing.assert_close(states[..., 32:], second)
    torch.testing.assert_close(options["pooled_output"], text.encode(xl, "g")[1])
    with pytest.raises(MahlstickError, match="two text encoders"):
        nodes.CLIPTextEncodeSDXL(clip=clip, text_g="", text_l="")


def entry(value: float, length: int = 2, **options: Any) -> list[Any]:
    return [[torch.full((1, length, 3), value), options]]


def test_options_of_conditionings() -> None:
    given = entry(1.0, strength=0.5)
    mask = torch.ones(8, 8)
    changes: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (
            nodes.ConditioningSetArea,
            {"width": 128, "height": 64, "x": 24, "y": 16, "strength": 2.0},
            {"area": (8, 16, 2, 3), "strength": 2.0, "set_area_to_bounds": False},
        ),
        (
            nodes.ConditioningSetAreaPercentage,
            {"width": 0.5, "height": 0.25, "x": 0.1, "y": 0.2},
            {"area": ("percentage", 0.25, 0.5, 0.2, 0.1), "strength": 1.0, "set_area_to_bounds": False},
        ),
        (nodes.ConditioningSetAreaStrength, {"strength": 3.0}, {"strength": 3.0}),
        (
            nodes.ConditioningSetTimestepRange,
            {"start": 0.2, "end": 0.7},
            {"start_percent": 0.2, "end_percent": 0.7, "strength": 0.5},
        ),
    ]
    for apply, inputs, options in changes:
        [[states, found]] = apply(conditioning=given, **inputs)[0]
        assert states is given[0][0] and found == {"strength": 0.5} | options
    for choice, bounds in (("default", False), ("mask bounds", True)):
        [[_, found]] = nodes.ConditioningSetMask(conditioning=given, mask=mask, strength=4.0, set_cond_area=choice)[0]
        assert found["mask"].shape == (1, 8, 8) and found["mask_strength"] == 4.0
        assert found["set_area_to_bounds"] is bounds and found["strength"] == 0.5
    assert given[0][1] == {"strength": 0.5}


def test_mixtures_of_conditionings() -> None:
    one, other = entry(1.0, pooled_output=torch.ones(1, 4)), entry(3.0, 1, pooled_output=torch.full((1, 4), 5.0))
    assert nodes.ConditioningCombine(conditioning_1=one, conditioning_2=other)[0] == [*one, *other]
    [[states, options]] = nodes.ConditioningConcat(conditioning_to=one, conditioning_from=other)[0]
    assert states[0, :, 0].tolist() == [1, 1, 3] and options == one[0][1] and options is not one[0][1]
    average = {"conditioning_to_strength": 0.25, "conditioning_from": other}
    [[states, options]] = nodes.ConditioningAverage(conditioning_to=one, **average)[0]
    assert states[0, :, 0].tolist() == [0.25 + 0.75 * 3, 0.25]  # the shorter is filled up with zeros
    assert options["pooled_output"].tolist() == [[0.25 + 0.75 * 5] * 4]
    [[_, options]] = nodes.ConditioningAverage(conditioning_to=entry(1.0), **average)[0]
    assert options["pooled_output"].tolist() == [[5.0] * 4]
    with pytest.warns(UserWarning, match="only the first"):
        nodes.ConditioningConcat(conditioning_to=one, conditioning_from=[*other, *one])
    [[states, options]] = nodes.ConditioningZeroOut(conditioning=other)[0]
    assert not states.any() and not options["pooled_output"].any() and other[0][0].all()
    [[states, options]] = nodes.ConditioningZeroOut(conditioning=entry(1.0))[0]
    assert options == {}


def test_the_face_of_the_nodes() -> None:
    assert [each.name for each in nodes.CLIPTextEncode.inputs] == ["text", "clip"]
    layer = nodes.CLIPSetLastLayer.info["input"]["required"]["stop_at_clip_layer"]
    assert layer == ["INT", {"default": -1, "min": -24, "max": -1, "step": 1}]
    area = nodes.ConditioningSetArea.info["input"]["required"]
    assert list(area) == ["conditioning", "width", "height", "x", "y", "strength"]
    assert area["width"] == ["INT", {"default": 64, "min": 64, "max": 16384, "step": 8}]
