"""Projectors: a video as an image prompt, neighbours joined, queries, any resolution, and words that choose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters import positions
from mahlstick.adapters.projectors import (
    PROJECTORS,
    Concat,
    CrossAttention,
    Merger,
    ProjectorName,
    Video,
    as_map,
)
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import read_dataset
from mahlstick.training.run import train
from mahlstick.training.tasks import IPAdapterTask, VideoPromptTask

FRAMES, GRID = 3, 4
SIZES: dict[str, Any] = {"tokens": 5, "depth": 2, "heads": 2, "head_dim": 8, "frames": FRAMES, "grid": GRID}


def projector(**sizes: Any) -> Video:
    torch.manual_seed(3)
    return Video(tiny.WIDTH, 24, **SIZES | sizes).eval()


def adapter(unet: Any, **sizes: Any) -> ms.IPAdapter:
    torch.manual_seed(3)
    return ms.IPAdapter.from_unet(unet, "video", feature_dim=tiny.WIDTH, **SIZES | sizes)


def clip(batch: int = 1, frames: int = FRAMES, length: int = GRID**2, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, length, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


# what it computes


@torch.no_grad()
def test_a_clip_becomes_tokens_with_or_without_the_encoders_class_token() -> None:
    video, features = projector(), clip(batch=2, length=GRID**2 + 1)
    assert video(features).shape == (2, 5, 24)
    assert torch.equal(video(features), video(features[:, :, 1:]))


def test_its_positions_begin_as_the_table_of_three_axes() -> None:
    assert torch.equal(projector().positions[0], positions.sincos_3d(FRAMES, GRID, GRID, 16))


@torch.no_grad()
def test_the_order_of_frames_and_patches_shows_by_the_positions_alone() -> None:
    video, features = projector(), clip()
    mixed = features[:, [2, 0, 1]], features[:, :, torch.randperm(GRID**2)]
    for other in mixed:
        assert (video(features) - video(other)).abs().max() > 1e-3
    video.positions.zero_()
    for other in mixed:
        assert torch.allclose(video(features), video(other), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_another_number_of_frames_has_the_table_extended_along_time(frames: int) -> None:
    video, other = projector(), projector(frames=frames)
    table = positions.extend_3d(video.positions, FRAMES, frames)
    other.load_state_dict(video.state_dict() | {"positions": table})
    assert torch.equal(video(clip(frames=frames)), other(clip(frames=frames)))


def test_gradients_reach_every_parameter() -> None:
    video = projector()
    video(clip(frames=FRAMES)).square().mean().backward()
    assert not [name for name, p in video.named_parameters() if p.grad is None or not p.grad.abs().any()]
    video.zero_grad()
    video(clip(frames=2 * FRAMES)).square().mean().backward()
    assert video.positions.grad is not None and video.positions.grad.abs().sum(dim=-1).all(), "the table's every row"


# the adapter


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_on_a_unet(family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    ip = adapter(unet)
    assert ip.tokens(clip()).shape == (1, 5, unet.config.cross_attention_dim)
    plain, seen = unet(**inputs).sample, []
    for seed in (0, 1):
        with ms.attach(unet, ms.ImagePrompt(ip, features=clip(seed=seed))):
            seen.append(unet(**inputs).sample)
    assert (seen[0] - plain).abs().max() > 1e-4
    assert (seen[0] - seen[1]).abs().max() > 1e-6
    assert torch.equal(unet(**inputs).sample, plain)


def test_frames_of_one_clip_are_encoded() -> None:
    ip, encoder = adapter(tiny.unet("sd1")), (tiny.image_encoder(), tiny.feature_extractor())
    frames = [tiny.picture(seed) for seed in range(FRAMES)]
    found, nothing = ip.features(frames, encoder)
    assert found.shape == nothing.shape == (1, FRAMES, GRID**2 + 1, tiny.WIDTH)
    single = ms.IPAdapter.from_unet(tiny.unet("sd1"), "mlp", feature_dim=tiny.WIDTH)
    each, none = single.features(frames, encoder)
    assert torch.equal(found[0], each)
    assert torch.equal(nothing, none.expand_as(each)[None])
    assert torch.isfinite(ip.tokens(found)).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, tiny.WIDTH), r"\(video\) takes features of shape \(batch, frames, length, 32\); got \(1, 16, 32\)"),
        ((1, 3, 16, 7), r"\(batch, frames, length, 32\); got \(1, 3, 16, 7\)"),
        ((1, 3, 25, tiny.WIDTH), r"4 x 4 patches \(16 features, or one more with a class token\); got 25"),
    ],
)
def test_features_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ms.MahlstickError, match=message):
        adapter(tiny.unet("sd1")).tokens(torch.zeros(shape))


def test_what_cannot_be_built_is_refused() -> None:
    unet = tiny.unet("sd1")
    for sizes in ({"frames": 0}, {"grid": 0}, {"heads": 1, "head_dim": 4}):
        with pytest.raises(ms.MahlstickError, match="at least 6 channels, one frame and one patch"):
            adapter(unet, **sizes)
    with pytest.raises(ms.MahlstickError, match="projector must be one of linear, resampler, mlp, video"):
        ms.IPAdapter.from_unet(unet, "movie")  # type: ignore[arg-type]


# files


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    ip = adapter(tiny.unet(family))
    file = ip.save_pretrained(tmp_path / "any name.safetensors")
    info = ms.inspect(file)
    assert (info.kind, info.config) == ("ip_adapter", ip.config)
    assert info.config["projector"] == "video"
    again = ms.load_adapter(file)
    assert isinstance(again, ms.IPAdapter) and again.config == ip.config
    assert torch.equal(again.tokens(clip(frames=5)), ip.tokens(clip(frames=5)))


def test_what_the_file_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    ip = adapter(tiny.unet("sd1"))
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(ip.save_pretrained(tmp_path / "ip")), bare)  # without metadata
    config = ms.inspect(bare).config
    told = [name for name, value in ip.config.items() if config[name] == value]
    assert {*ip.config} - {*told} == {"heads", "head_dim", "frames", "grid"}
    with pytest.raises(ms.MahlstickError, match=r"heads of its video projector \(16 channels\): give heads="):
        ms.IPAdapter.from_pretrained(bare, frames=FRAMES)
    for frames in ({}, {"frames": 5}, {"frames": 0}, {"frames": "three"}):
        with pytest.raises(ms.MahlstickError, match="for how many frames its positions are: give frames="):
            ms.IPAdapter.from_pretrained(bare, heads=2, **frames)
    assert ms.IPAdapter.from_pretrained(bare, heads=2, frames=FRAMES).config == ip.config
    usual = adapter(tiny.unet("sd1"), frames=8, head_dim=64)
    save_file(load_file(usual.save_pretrained(tmp_path / "usual")), bare)
    assert ms.IPAdapter.from_pretrained(bare).config == usual.config, "what is usual goes without saying"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("image_proj.positions"), r"its projector lacks image_proj\.positions"),
        (lambda s: s.pop("image_proj.class_token"), r"1 missing \(image_proj\.class_token\)"),
        (lambda s: s.pop("image_proj.blocks.1.norm3.bias"), r"1 missing \(image_proj\.blocks\.1\.norm3\.bias\)"),
        (lambda s: s.update({"image_proj.positions": torch.zeros(49)}), "weights of too few dimensions"),
        (lambda s: s.update({"image_proj.pool.layers.1.0.norm1.bias": torch.zeros(16)}), "1 unexpected"),
    ],
)
def test_a_file_with_a_fault(change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    ip = adapter(tiny.unet("sd1"))
    state = load_file(ip.save_pretrained(tmp_path / "ip"))
    change(state)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ms.MahlstickError, match=rf"broken\.safetensors cannot be read: .*{message}"):
        ms.IPAdapter.from_pretrained(tmp_path / "broken.safetensors", heads=2, frames=FRAMES)


def test_a_video_is_an_image_prompt() -> None:
    """Of a long clip it sees the frames in the middle of equal parts; other adapters are told to take pictures."""
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))
    ip = adapter(pipe.unet, frames=4)
    clip = [tiny.picture(seed, 32) for seed in range(20)]
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}

    def made(*units: ms.ImagePrompt) -> Any:
        with ms.attach(pipe, *units):
            return pipe("fox", generator=torch.Generator().manual_seed(1), **call).images

    found = made(ms.ImagePrompt(ip, video=clip))
    assert (found == made(ms.ImagePrompt(ip, video=[clip[i] for i in positions.sample_sparsely(20, 4)]))).all()
    assert (found != made(ms.ImagePrompt(ip, video=clip[::-1]))).any()
    with pytest.raises(ms.MahlstickError, match="takes video=, every other one images="):
        ms.attach(pipe, ms.ImagePrompt(ip, clip))
    linear = ms.IPAdapter.from_unet(pipe.unet, tokens=2, feature_dim=tiny.WIDTH)
    with pytest.raises(ms.MahlstickError, match="this one's is linear"):
        ms.attach(pipe, ms.ImagePrompt(linear, video=clip))


# patches, joined or asked


def patches(batch: int = 2, side: int = 4, class_token: bool = False, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, side**2 + class_token, tiny.WIDTH, generator=random)


def made(kind: Any, *sizes: int) -> Any:
    """A projector from the tiny encoder's width to 24, at random weights that tell one wiring from another."""
    torch.manual_seed(3)
    net = kind(tiny.WIDTH, 24, *sizes)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


PATCHWISE = {
    "concat": (made(Concat, 4), 4),
    "cross_attention": (made(CrossAttention, 9, 2, 8), 9),
    "merger": (made(Merger, 2, 2, 8), 4),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PATCHWISE)
def test_patches_come_as_a_square_with_or_without_class_token_or_as_a_map(name: str) -> None:
    net, tokens = PATCHWISE[name]
    features = patches(class_token=True)
    found = net(features)
    assert found.shape == (2, tokens, 24)
    assert torch.equal(found, net(features[:, 1:]))
    assert torch.equal(found, net(features[:, 1:].unflatten(1, (4, 4))))
    assert (found[0] - net(patches(seed=1))[0]).abs().max() > 1e-3
    assert torch.allclose(found[:1], net(features[:1]), atol=1e-5)


@pytest.mark.parametrize("length", [0, 3, 6, 12, 15])
def test_what_is_no_square_is_refused(length: int) -> None:
    with pytest.raises(ms.MahlstickError, match=f"{length} features are no square of patches"):
        as_map(torch.zeros(1, length, 8))


@torch.no_grad()
def test_four_neighbours_become_a_token_and_nothing_else_changes_it() -> None:
    net, features = made(Concat, 4), patches()
    other = features.clone()
    other[:, 5] += 1
    changed = (net(other) - net(features)).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [False, True, False, False]
    assert torch.allclose(net(features)[:, 1], net.norm(net.joined(features[:, 4:8].flatten(1))), atol=1e-5)


@torch.no_grad()
def test_one_neighbour_is_a_linear_layer_on_every_patch_and_a_last_group_is_filled_up() -> None:
    net = made(Concat, 1)
    assert torch.allclose(net(patches()), net.norm(net.joined(patches())), atol=1e-5)
    odd = patches(side=3)
    wanted = torch.cat([odd, odd[:, -1:].expand(-1, 3, -1)], dim=1)
    net = made(Concat, 4)
    assert torch.allclose(net(odd), net.norm(net.joined(wanted.unflatten(1, (3, 4)).flatten(2))), atol=1e-5)


@torch.no_grad()
def test_queries_tell_patches_apart_by_their_places_alone() -> None:
    net, features = made(CrossAttention, 9, 2, 8), patches()
    mixed = features[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    assert (net(features) - net(mixed)).abs().max() > 1e-3
    net._places = lambda height, width, like: torch.zeros(())
    assert torch.allclose(net(features), net(mixed), atol=1e-5)


@torch.no_grad()
def test_cross_attention_is_that_of_torch() -> None:
    net, features = made(CrossAttention, 16, 2, 8), patches()
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    parts = (net.to_q, net.to_k, net.to_v)
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([net.to_q.bias, torch.zeros(16), net.to_v.bias]))
    theirs.out_proj.load_state_dict(net.to_out.state_dict())
    table = positions.sincos_2d(positions.places_2d(4, 4).float(), 16)  # the keys stand where the queries do
    x, q = net.norm_kv(net.proj_in(features)), net.norm_q(net.queries)
    read = theirs((q + table).expand(2, -1, -1), x + table, x)[0]
    assert torch.allclose(net(features), net.norm_out(net.proj_out(read)), atol=1e-5)


def test_the_published_size_has_the_published_parameters() -> None:
    """Qwen-VL's table 1: 256 queries and 0.08 B, of which its program counts the last layer to the image encoder."""
    with torch.device("meta"):
        net = CrossAttention(1664, 4096, 256, 32, 128)
        last = sum(p.numel() for p in [*net.proj_out.parameters(), *net.norm_out.parameters()])
    assert round((sum(p.numel() for p in net.parameters()) - last) / 1e9, 2) == 0.08
    with pytest.raises(ms.MahlstickError, match="8 do not, give 4 or 9"):
        CrossAttention(8, 8, 8, 1, 8)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "tokens"), [(16, 16, 64), (4, 6, 6), (3, 5, 6), (1, 1, 1)])
def test_two_by_two_neighbours_of_any_size_are_merged(height: int, width: int, tokens: int) -> None:
    """224² pixels in patches of 14 are 16 × 16, which become 64."""
    found = made(Merger, 1, 2, 8)(torch.randn(1, height, width, tiny.WIDTH))
    assert found.shape == (1, tokens, 24) and torch.isfinite(found).all()


@torch.no_grad()
def test_without_attention_a_merged_token_is_its_four_patches() -> None:
    net, features = made(Merger, 0, 2, 8), patches()
    other = features.clone().unflatten(1, (4, 4))
    other[:, 2, 1] += 1  # the third row's second patch: of the third token
    assert ((net(other) - net(features)).abs().amax(dim=(0, 2)) > 1e-6).tolist() == [False, False, True, False]
    x = net.norm(net.proj_in(features)).unflatten(1, (4, 4))
    first = torch.cat([x[:, 0, 0], x[:, 0, 1], x[:, 1, 0], x[:, 1, 1]], dim=-1)
    assert torch.allclose(net(features)[:, 0], net.norm_out(net.merge(first)), atol=1e-5)


@torch.no_grad()
def test_turned_by_rows_and_columns_products_depend_on_the_way_between() -> None:
    q, k = torch.randn(2, 1, 8)
    near, far = (
        positions.rotate_2d(q, torch.tensor([[a, b]])) @ positions.rotate_2d(k, torch.tensor([[a + 2, b + 1]])).T
        for a, b in ((0, 0), (5, 11))
    )
    assert torch.allclose(near, far, atol=1e-4)
    other = positions.rotate_2d(q, torch.tensor([[0, 0]])) @ positions.rotate_2d(k, torch.tensor([[1, 2]])).T
    assert (near - other).abs() > 1e-4
    with pytest.raises(ms.MahlstickError, match="multiple of 4 channels; got 6"):
        positions.rotate_2d(torch.zeros(1, 6), torch.zeros(1, 2))
    with pytest.raises(ms.MahlstickError, match="multiple of 4, not 6"):
        Merger(8, 8, 1, 1, 6)


# the words choose


READER: dict[str, Any] = {"tokens": 3, "depth": 2, "heads": 2, "head_dim": 8, "vocabulary": 515, "places": 20}


def reader(unet: Any) -> ms.IPAdapter:
    torch.manual_seed(3)
    adapter = ms.IPAdapter.from_unet(unet, "instruct_qformer", feature_dim=tiny.WIDTH, **READER)
    return tiny.awake(adapter)


@torch.no_grad()
def test_tokens_depend_on_the_words_and_on_nothing_behind_them() -> None:
    adapter, features = reader(tiny.unet("sd1")), patches(batch=1, class_token=True)
    one, other, empty = adapter.words(["fox", "hen", ""], tiny.tokenizer()).split(1)
    assert one.shape == (1, 20)
    found = adapter.tokens(features, one)
    assert found.shape == (1, 3, tiny.WIDTH)
    for words in (other, empty):
        assert (adapter.tokens(features, words) - found).abs().max() > 1e-6
    assert torch.allclose(adapter.tokens(features, one[:, :5]), found, atol=1e-5), "what fills up is not seen"
    assert adapter.tokens(patches(batch=2), one).shape == (2, 3, tiny.WIDTH), "one text for all"
    with pytest.raises(ms.MahlstickError, match="reads the prompt: give prompt="):
        adapter.tokens(features)
    with pytest.raises(ms.MahlstickError, match="there is no tokenizer: attach it to a pipeline"):
        adapter.words(["fox"])


@torch.no_grad()
def test_under_guidance_no_picture_is_read_with_the_empty_prompt() -> None:
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))
    adapter, pictures = reader(pipe.unet), [tiny.picture(seed) for seed in range(2)]
    features, nothing = adapter.features(pictures, (pipe.image_encoder, pipe.feature_extractor))
    fox, hen, empty = adapter.words(["a fox", "a hen", ""], pipe.tokenizer).split(1)

    def tokens(images: Any, prompt: Any, batch: int) -> tuple[Tensor, Tensor]:
        with ms.attach(pipe, ms.ImagePrompt(adapter, images, prompt=prompt)) as attached:
            unit: Any = attached.attachments[0]
            return unit.tokens(batch), unit.negative(batch)

    both = torch.cat([adapter.tokens(features[:1], fox), adapter.tokens(features[1:], fox)], dim=1)
    seen, unseen = tokens([pictures], "a (fox:1.3)", 1)
    assert torch.allclose(seen, both, atol=1e-5), "all references read the prompt, without its weights"
    assert torch.allclose(unseen, adapter.tokens(nothing, empty), atol=1e-5)
    each = torch.cat([adapter.tokens(features[:1], fox), adapter.tokens(features[1:], hen)])
    assert torch.allclose(tokens(pictures, ["a fox", "a hen"], 2)[0], each, atol=1e-5), "one reference for each prompt"
    assert torch.allclose(tokens([[one] for one in pictures], ["a fox", "a hen"], 2)[0], each, atol=1e-5)
    one = torch.cat([adapter.tokens(features[:1], words) for words in (fox, hen)])
    assert torch.allclose(tokens([pictures[:1]], ["a fox", "a hen"], 4)[0], one, atol=1e-5), "one for all prompts"
    hens = torch.cat([adapter.tokens(features[:1], hen), adapter.tokens(features[1:], hen)], dim=1)
    seen, _ = tokens([pictures], ["a fox", "a hen"], 2)
    assert torch.allclose(seen, torch.cat([both, hens]), atol=1e-5), "a group is all prompts', however many they are"
    with pytest.raises(ms.MahlstickError, match="prompt: 3 prompts do not go with 2 groups"):
        tokens([[one] for one in pictures], ["a", "b", "c"], 3)
    with pytest.raises(ms.MahlstickError, match="give prompt= to ImagePrompt"):
        tokens(pictures, None, 1)


def test_a_request_hands_its_prompt_over() -> None:
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))
    adapter = reader(pipe.unet)
    size: dict[str, Any] = {"seed": 1, "steps": 1, "width": 64, "height": 64}
    spec = {"adapter": adapter, "images": [tiny.picture()]}
    made = ms.generate(ms.Request(prompt="a fox", image_prompts=[spec], **size), pipe=pipe, progress=False).images[0]
    with ms.attach(pipe, ms.ImagePrompt(adapter, [[tiny.picture()]], prompt="a hen")):
        other = pipe(
            "a fox", generator=torch.Generator().manual_seed(1), num_inference_steps=1, width=64, height=64
        ).images[0]
    assert made.tobytes() != other.tobytes()


# files, and training


@torch.no_grad()
@pytest.mark.parametrize("name", ["concat", "cross_attention", "merger", "qformer", "instruct_qformer"])
def test_what_a_bare_file_cannot_tell_is_asked_for_or_usual(name: ProjectorName, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"tokens": 4, "depth": 2, "heads": 2, "head_dim": 64, "vocabulary": 515, "places": 20}
    ip = ms.IPAdapter.from_unet(tiny.unet("sd1"), name, feature_dim=tiny.WIDTH, **sizes)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(ip.save_pretrained(tmp_path / "ip")), bare)  # without metadata
    assert ms.IPAdapter.from_pretrained(bare).config == ip.config, "what is usual goes without saying"
    other = ms.IPAdapter.from_unet(
        tiny.unet("sd1"), name, feature_dim=tiny.WIDTH, **sizes | {"head_dim": 12, "join": 3}
    )
    save_file(load_file(other.save_pretrained(tmp_path / "other")), bare)
    told = {"join": 3} if name == "concat" else {"heads": 2}
    with pytest.raises(ms.MahlstickError, match=f"give {next(iter(told))}="):
        ms.IPAdapter.from_pretrained(bare, **({"join": 7} if name == "concat" else {}))
    assert ms.IPAdapter.from_pretrained(bare, **told).config == other.config


def test_training_knows_every_projector() -> None:
    assert get_args(TrainConfig.model_fields["projector"].annotation) == PROJECTORS


def base() -> Any:
    return tiny.quiet(diffusers.StableDiffusionPipeline(**copy.deepcopy(tiny.components("sd1"))))


def config(folder: Path, out: Path, **fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {
        "task": "ip-adapter", "steps": 1, "batch": 2, "depth": 1, "heads": 1, "frames": 2, "validate_every": 1,
        "warmup": 1, "held_out": 0.3, "rate": 1e-3, "resolution": tiny.SIZE, "cache": str(out.parent / "cache"),
    }  # fmt: skip
    return TrainConfig(data=str(folder), out=str(out), **sizes | fields)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, folders of frames, and three pictures with captions."""
    folder = tmp_path_factory.mktemp("examples")
    for i in range(3):
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "clips" / f"{i}").mkdir(parents=True)
        tiny.picture(i, 64).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"noise {i}")
        for frame in range(4):
            tiny.picture(10 * i + frame, 64).save(folder / "clips" / f"{i}" / f"{frame}.png")
    return folder


@pytest.mark.parametrize("name", PROJECTORS[2:])  # the first two are trained elsewhere
def test_each_is_trained_saved_and_loaded(name: str, examples: Path, tmp_path: Path) -> None:
    folder = examples / ("clips" if name == "video" else "pictures")
    validated = name in ("video", "instruct_qformer")
    run = train(config(folder, tmp_path / name, projector=name, validate_every=int(validated)), base())
    adapter = ms.IPAdapter.from_pretrained(run)
    assert adapter.config["projector"] == name
    assert ('"likeness"' in (run / "log.jsonl").read_text()) == validated, "pictures are made for it"
    learned = load_file(run / "ip_adapter.safetensors")
    task = (VideoPromptTask if name == "video" else IPAdapterTask)(
        config(folder, tmp_path / "x", projector=name), base()
    )
    assert learned.keys() == task.adapter.state_dict().keys()


def test_a_projector_that_reads_learns_with_its_rows_own_words(examples: Path, tmp_path: Path) -> None:
    given = config(
        examples / "pictures", tmp_path / "run", projector="instruct_qformer", text_dropout=0, image_dropout=0
    )
    task = IPAdapterTask(given, base())
    tiny.awake(task.adapter)
    features = task.encode(read_dataset(examples / "pictures"))
    rows = [task.draw(row, torch.Generator().manual_seed(0)) for row in features]
    for row, text in zip(rows, ("noise 0", "noise 1", "noise 2"), strict=True):
        assert torch.equal(row["words"], task.adapter.words([text])[0])
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"u": torch.full((3,), 0.5)}
    plain = task(batch)
    assert (task(batch | {"words": batch["words"].roll(1, 0)}) - plain).abs().max() > 1e-9
    task.text_dropout = 1.0
    assert torch.equal(task.draw(features[0], torch.Generator())["words"], task.adapter.words([""])[0])


def test_a_video_projector_learns_a_frame_from_all_of_them(examples: Path, tmp_path: Path) -> None:
    task = VideoPromptTask(config(examples / "clips", tmp_path / "run", projector="video", image_dropout=0), base())
    [row] = task.encode(read_dataset(examples / "clips", kind="clips")[:1])
    assert row["latents"].shape[0] == row["image"].shape[0] == 2
    drawn = [task.draw(row, torch.Generator().manual_seed(i)) for i in range(8)]
    assert {int((row["latents"] == one["latents"]).flatten(1).all(1).nonzero()) for one in drawn} == {0, 1}
    assert all(torch.equal(one["image"], row["image"]) for one in drawn)
    task.config.__dict__["image_dropout"] = 1.0
    assert (
        torch.equal(task.draw(row, torch.Generator())["image"], task.nothing)
        and task.nothing.shape == row["image"].shape
    )
