"""Loaders, LoRA and FreeU: what is loaded, that a changed file is noticed, and what patches do and undo."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

import mahlstick as ms
from benchmarks.tiny import text_encoder, tokenizer, unet_inputs, vae
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders, text
from mahlstick.nodes.builtin import latents, sampling, tuning
from mahlstick.nodes.builtin import loaders as nodes
from mahlstick.nodes.builtin.conditioning import CLIPTextEncode
from mahlstick.nodes.builtin.image_prompts import IPAdapter, IPAdapterUnifiedLoader
from mahlstick.nodes.values import Clip, Model
from tests import tiny

SD, XL = "sd1", "sdxl"


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    with folders.using(folders.Folders(models=tmp_path)):
        yield tmp_path


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def named(node: Any, name: str) -> Any:
    return next(each for each in node.inputs if each.name == name)


def test_checkpoints(models: Path) -> None:
    assert named(nodes.CheckpointLoaderSimple, "ckpt_name").choices == ("embedded",)
    model, clip, vae_value = nodes.CheckpointLoaderSimple(ckpt_name="embedded")
    pipe = nodes.embedded_pipeline()
    assert model.unet is pipe.unet and clip.encoders == (pipe.text_encoder,) and vae_value.autoencoder is pipe.vae
    (models / "checkpoints").mkdir()
    pipe = tiny.sdxl()
    pipe.save_pretrained(models / "checkpoints" / "mine")
    for loader, name in ((nodes.CheckpointLoaderSimple, "ckpt_name"), (nodes.DiffusersLoader, "model_path")):
        assert "mine" in named(loader, name).choices
        model, clip, vae_value = loader(**{name: "mine"})
        assert same_weights(model.unet, pipe.unet)
        assert [type(each).__name__ for each in clip.encoders] == ["CLIPTextModel", "CLIPTextModelWithProjection"]
        assert nodes.CheckpointLoaderSimple(ckpt_name="mine")[0].unet is model.unet
    with pytest.raises(MahlstickError, match="other: no such model below"):
        nodes.CheckpointLoaderSimple(ckpt_name="other")


def test_a_changed_file_is_noticed_and_read_again(models: Path) -> None:
    vae().save_pretrained(models / "vae" / "mine")
    fingerprint: Any = nodes.VAELoader.fingerprint
    before, first = fingerprint(vae_name="mine"), nodes.VAELoader(vae_name="mine")[0].autoencoder
    assert same_weights(first, vae())
    assert fingerprint(vae_name="mine") == before and nodes.VAELoader(vae_name="mine")[0].autoencoder is first
    other = copy.deepcopy(vae())
    next(other.parameters()).data += 1
    other.save_pretrained(models / "vae" / "mine")
    assert fingerprint(vae_name="mine") != before
    assert same_weights(nodes.VAELoader(vae_name="mine")[0].autoencoder, other)
    for loader in (nodes.CheckpointLoaderSimple, nodes.CLIPLoader, nodes.UNETLoader, nodes.CLIPVisionLoader):
        assert loader.fingerprint(None) is None  # joined to another node
    assert nodes.CheckpointLoaderSimple.fingerprint("embedded") == "embedded"


def test_parts_from_single_files(models: Path) -> None:
    unet = tiny.sdxl().unet
    for kind, model in (("vae", vae()), ("diffusion_models", unet)):
        (models / kind / "part").mkdir(parents=True)
        model.save_config(models / kind / "part")
        save_file(model.state_dict(), models / kind / "part.safetensors")
    assert same_weights(nodes.VAELoader(vae_name="part.safetensors")[0].autoencoder, vae())
    model = nodes.UNETLoader(unet_name="part.safetensors")[0]
    assert same_weights(model.unet, unet)
    assert model.prediction == "epsilon" and model.latent_scale == 0.13025
    (models / "vae" / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(MahlstickError, match=r"broken\.safetensors: cannot be loaded as AutoencoderKL"):
        nodes.VAELoader(vae_name="broken.safetensors")


def test_text_encoders(models: Path) -> None:
    small = CLIPTextConfig(vocab_size=514, hidden_size=64, intermediate_size=48, num_hidden_layers=2, hidden_act="gelu")
    small.num_attention_heads, small.eos_token_id, small.bos_token_id = 1, 513, 512
    encoder = CLIPTextModel(small).eval()
    # As published: with a level of names that transformers has left out since, and a projection that nobody reads.
    state = {f"text_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    (models / "text_encoders").mkdir()
    file = models / "text_encoders" / "file.safetensors"
    save_file(state | {"text_projection.weight": torch.zeros(64, 64)}, file)
    tokenizer().save_pretrained(models / "text_encoders" / "file")
    clip = nodes.CLIPLoader(clip_name="file.safetensors", type="stable_diffusion")[0]
    assert same_weights(clip.encoders[0], encoder)
    padding = tokenizer().convert_tokens_to_ids("!")
    with torch.no_grad():
        wanted = encoder(torch.tensor([[*tokenizer()("a").input_ids, *[padding] * 74]])).last_hidden_state
    assert torch.equal(text.encode(clip, "a")[0], wanted)

    for name, projection in (("second", True), ("first", False)):
        text_encoder(projection).save_pretrained(models / "text_encoders" / name)
        tokenizer().save_pretrained(models / "text_encoders" / name)
    both = nodes.DualCLIPLoader(clip_name1="second", clip_name2="first", type="sdxl")[0]
    assert same_weights(both.encoders[0], text_encoder()) and same_weights(both.encoders[1], text_encoder(True))
    save_file({"other.weight": torch.zeros(1)}, file)
    with pytest.raises(MahlstickError, match=r"file\.safetensors: has no text_model\.\* tensors"):
        nodes.CLIPLoader(clip_name="file.safetensors")


def test_image_encoders(models: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=32, projection_dim=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=16,
        image_size=16, patch_size=8, hidden_act="gelu",
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()
    (models / "clip_vision").mkdir()
    save_file(encoder.state_dict() | {"logit_scale": torch.ones(1)}, models / "clip_vision" / "file.safetensors")
    encoder.save_pretrained(models / "clip_vision" / "folder")
    pixels = torch.randn(1, 3, 16, 16)
    for name in ("file.safetensors", "folder"):
        found = nodes.CLIPVisionLoader(clip_name=name)[0].encoder
        with torch.no_grad():
            assert torch.equal(found(pixels).image_embeds, encoder(pixels).image_embeds)
    for missing in ("visual_projection.weight", "vision_model.encoder.layers.1.mlp.fc2.bias"):
        state = encoder.state_dict()
        del state[missing]
        save_file(state, models / "clip_vision" / "file.safetensors")
        with pytest.raises(MahlstickError, match=rf"file\.safetensors: lacks .?{missing}"):
            nodes.CLIPVisionLoader(clip_name="file.safetensors")
    embedded = nodes.CLIPVisionLoader(clip_name="embedded")[0]
    assert embedded.encoder is nodes.embedded_pipeline().image_encoder


LAYERS = {
    "unet": ("attn1.to_q", "attn2.to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def lora_tensors(pipe: Any, seed: int) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Random halves (down, up) of rank 2 for layers of the UNet and the text encoders."""
    torch.manual_seed(seed)
    halves = {}
    for part in KOHYA:
        for name, module in getattr(pipe, part, torch.nn.Module()).named_modules():
            here = part != "unet" or name.startswith("up_blocks.1")  # a few of many, for peft takes its time
            if here and name.endswith(LAYERS[part.removesuffix("_2")]):
                out, *inner = module.weight.shape
                up = torch.randn(out, 2, *[1] * (len(inner) - 1))
                halves[part, name.removeprefix("text_model.")] = torch.randn(2, *inner) / 3, up / 3
    return halves


def save_lora(pipe: Any, path: Path, layout: str, seed: int) -> None:
    tensors = {}
    for (part, name), (down, up) in lora_tensors(pipe, seed).items():
        full = name if part == "unet" else f"text_model.{name}"
        if layout == "kohya":
            prefix = f"{KOHYA[part]}_{full.replace('.', '_')}"
            tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
            tensors[f"{prefix}.alpha"] = torch.tensor(1.0 if "conv" in name else 3.0)
        else:
            tensors |= {f"{part}.{full}.lora_A.weight": down, f"{part}.{full}.lora_B.weight": up}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


def clip_of(pipe: Any) -> Clip:
    ends = ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",)
    found = [(getattr(pipe, f"tokenizer{end}"), getattr(pipe, f"text_encoder{end}")) for end in ends]
    return Clip(*zip(*found, strict=True))


@torch.no_grad()
def estimates(family: str, model: Model, clip: Clip) -> tuple[Tensor, Tensor]:
    """What the UNet and the text encoders make under the patches."""
    with patched(model):
        sample = model.unet(**unet_inputs(family)).sample
    return sample, text.encode(clip, "a fox")[0]


@contextmanager
def patched(model: Model) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in model.patches:
            stack.enter_context(patch(model.unet))
        yield


def state_of(network: torch.nn.Module) -> list[Any]:
    """What a patch must leave: modules, weights and where they lie, hooks, flags."""
    modules = [(id(each), sorted(vars(each)), dict(each._forward_pre_hooks)) for each in network.modules()]
    weights = [(name, each.data_ptr(), each.requires_grad, each.clone()) for name, each in network.named_parameters()]
    return [modules, [row[:3] for row in weights], [row[3].flatten() for row in weights]]


def is_same(one: list[Any], other: list[Any]) -> bool:
    return one[:2] == other[:2] and all(map(torch.equal, one[2], other[2]))


@pytest.mark.parametrize(("family", "layout"), [(SD, "peft"), (XL, "kohya")])
def test_lora_changes_what_diffusers_says_and_leaves_no_trace(models: Path, family: str, layout: str) -> None:
    pipe = copy.copy(tiny.sd() if family == SD else tiny.sdxl())
    for number in (1, 2):
        save_lora(pipe, models / "loras" / f"{number}.safetensors", layout, number)
    model, clip = Model(pipe.unet, torch.ones(3)), clip_of(pipe)
    networks = (pipe.unet, *clip.encoders)
    plain = estimates(family, model, clip)
    before = [state_of(each) for each in networks]
    changed, both = tuning.LoraLoader(
        model=model, clip=clip, lora_name="1.safetensors", strength_model=0.5, strength_clip=0.7
    )
    changed = tuning.LoraLoaderModelOnly(model=changed, lora_name="2.safetensors", strength_model=-0.3)[0]
    generator = torch.get_rng_state()
    found = estimates(family, changed, both)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(is_same(kept, state_of(network)) for kept, network in zip(before, networks, strict=True))
    assert all(map(torch.equal, plain, estimates(family, model, clip)))

    reference = copy.deepcopy(pipe)
    for number in ("1", "2"):
        reference.load_lora_weights(str(models / "loras" / f"{number}.safetensors"), adapter_name=number)
    reference.set_adapters(["1"], [0.7])
    reference.unet.set_adapters(["1", "2"], [0.5, -0.3])
    wanted = estimates(family, Model(reference.unet, torch.ones(3)), clip_of(reference))
    for mine, theirs, unchanged in zip(found, wanted, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert (theirs - unchanged).abs().max() > 0.05


def test_lora_that_do_not_fit(models: Path) -> None:
    pipe = tiny.sd()
    model, clip = Model(pipe.unet, torch.ones(3)), clip_of(pipe)
    kept = state_of(pipe.unet)

    def save_layers(name: str, **layers: int) -> Model:
        """A LoRA of the UNet's layers, by the number of their outputs."""
        tensors = {f"unet.{layer}.lora_A.weight": torch.ones(2, 4, 3, 3) for layer in layers}
        tensors |= {f"unet.{layer}.lora_B.weight": torch.ones(width, 2, 1, 1) for layer, width in layers.items()}
        (models / "loras").mkdir(exist_ok=True)
        save_file(tensors, models / "loras" / name)
        return tuning.LoraLoaderModelOnly(model=model, lora_name=name)[0]

    width = pipe.unet.conv_in.out_channels
    with pytest.warns(UserWarning, match="this unet lacks 1 of 2 layers"):
        estimates(SD, save_layers("more.safetensors", conv_in=width, elsewhere=8), clip)
    with pytest.raises(MahlstickError, match=r"wide\.safetensors: conv_in\.lora_A\.weight is for a layer of"):
        estimates(SD, save_layers("wide.safetensors", conv_in=width + 1), clip)
    with pytest.raises(MahlstickError, match=r"other\.safetensors: this LoRA changes no layer of this unet"):
        estimates(SD, save_layers("other.safetensors", elsewhere=8), clip)
    assert is_same(kept, state_of(pipe.unet))
    save_file({"weight": torch.ones(2)}, models / "loras" / "none.safetensors")
    with pytest.raises(MahlstickError, match=r"none\.safetensors: is no LoRA"):
        tuning.LoraLoader(model=model, clip=clip, lora_name="none.safetensors")
    assert tuning.LoraLoader(
        model=model, clip=clip, lora_name="none.safetensors", strength_model=0.0, strength_clip=0.0
    ) == (model, clip)
    strength = named(tuning.LoraLoader, "strength_model").info
    assert strength == ["FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}]


def two_levels() -> UNet2DConditionModel:
    return tiny.sd(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).unet


@torch.no_grad()
def test_free_u_is_diffusers_where_both_agree() -> None:
    unet, inputs = two_levels(), unet_inputs(SD)
    model = Model(unet, torch.ones(3))
    plain, kept = unet(**inputs).sample, state_of(unet)
    # With equal factors it does not matter to which level a block belongs; on two levels diffusers changes every block.
    factors = {"b1": 1.3, "b2": 1.3, "s1": 0.6, "s2": 0.6}
    with patched(tuning.FreeU(model=model, **factors)[0]):
        found = unet(**inputs).sample
    assert is_same(kept, state_of(unet)) and torch.equal(plain, unet(**inputs).sample)
    unet.enable_freeu(**factors)
    wanted = unet(**inputs).sample
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def freed(values: np.ndarray[Any, Any], width: int, b: float, s: float, second: bool) -> np.ndarray[Any, Any]:
    """ComfyUI's formula for one picture ``(channels, h, w)``, the backbone's channels first."""
    values = values.copy()
    backbone, skip = values[:width], values[width:]
    mean = backbone.mean(axis=0)
    mean = (mean - mean.min()) / (mean.max() - mean.min())
    backbone[: width // 2] *= (b - 1) * mean + 1 if second else b
    frequencies = np.fft.fftn(skip, axes=(-2, -1))
    for row in (-1, 0):
        for column in (-1, 0):
            frequencies[:, row, column] *= s
    return np.concatenate([backbone, np.fft.ifftn(frequencies, axes=(-2, -1)).real])


@torch.no_grad()
@pytest.mark.parametrize("second", [False, True])
def test_free_u_goes_by_the_width_of_the_backbone(second: bool) -> None:
    unet = tiny.sd(block_out_channels=(8, 16, 32, 32)).unet
    node = tuning.FreeU_V2 if second else tuning.FreeU
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}

    def look(when: str) -> list[Any]:
        return [each.register_forward_pre_hook(lambda _, args: seen[when].append(args[0].clone())) for each in resnets]

    handles = look("before")
    with patched(node(model=Model(unet, torch.ones(3)), b1=1.4, b2=1.2, s1=0.5, s2=0.3)[0]):
        handles += look("after")
        unet(**unet_inputs(SD) | {"sample": torch.randn(2, 4, 16, 16)})
    widest, next_widest, other = (1.4, 0.5), (1.2, 0.3), (1.0, 1.0)
    # Behind each level's last block the backbone is as wide as that level.
    factors = [*[(32, *widest)] * 7, *[(16, *next_widest)] * 3, *[(8, *other)] * 2]
    assert len(factors) == len(resnets)
    for (width, b, s), before, after in zip(factors, *seen.values(), strict=True):
        for mine, given in zip(after, before, strict=True):
            np.testing.assert_allclose(mine, freed(given.double().numpy(), width, b, s, second), rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()


def picture_of(**changes: Any) -> Tensor:
    """Latents of the embedded model, from the loader through the sampler."""
    model, clip, _ = nodes.CheckpointLoaderSimple(ckpt_name="embedded")
    if "lora" in changes:
        model, clip = tuning.LoraLoader(model=model, clip=clip, lora_name=changes["lora"])
    if "image" in changes:
        model, loaded = IPAdapterUnifiedLoader(model=model, preset="embedded")
        model = IPAdapter(model=model, ipadapter=loaded, image=changes["image"])[0]
    positive, negative = (CLIPTextEncode(clip=clip, text=each)[0] for each in ("a (red:1.2) circle", "blue"))
    latent = latents.EmptyLatentImage(width=64, height=64, batch_size=1)[0]
    return sampling.KSampler(
        model=model, seed=3, steps=1, cfg=4.0, sampler_name="euler", scheduler="normal", positive=positive,
        negative=negative, latent_image=latent, denoise=1.0,
    )[0]["samples"]  # fmt: skip


def test_from_the_checkpoint_to_latents(models: Path) -> None:
    pipe = ms.load_pipeline("embedded")
    save_lora(pipe, models / "loras" / "small.safetensors", "kohya", 5)
    plain = picture_of()
    made: Mapping[str, Tensor] = {
        "lora": picture_of(lora="small.safetensors"),
        "image": picture_of(image=torch.rand(1, 64, 64, 3, generator=torch.manual_seed(1))),
    }
    assert plain.isfinite().all()
    for name, latent in made.items():
        assert latent.isfinite().all() and (latent - plain).abs().max() > 0.05, name
    assert torch.equal(picture_of(), plain)


def test_models_are_kept_until_they_are_to_be_forgotten() -> None:
    def unet() -> Any:
        return nodes.CheckpointLoaderSimple(ckpt_name="embedded")[0].unet

    kept = unet()
    assert unet() is kept
    nodes.forget()
    assert unet() is not kept
