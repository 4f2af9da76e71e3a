"""The Q-Former: equal to transformers', its masks, its heads, its files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters import formats
from mahlstick.adapters.load import load_qformer
from mahlstick.adapters.qformer import ImageText, Mask, QFormer, similarity, token_ids
from mahlstick.training import alignment
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import read_dataset
from mahlstick.training.run import train
from mahlstick.training.tasks import QFormerTask

WIDTH, HEADS, DEPTH, FEATURES, VOCABULARY, PLACES, QUERIES = 32, 4, 4, 24, 41, 16, 5
CONFIG: dict[str, Any] = {
    "feature_dim": FEATURES, "queries": QUERIES, "depth": DEPTH, "heads": HEADS, "width": WIDTH, "inner": 48,
    "every": 2, "vocabulary": VOCABULARY, "places": PLACES, "contrast_dim": 8, "match": True, "caption": True,
}  # fmt: skip
THEIRS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": PLACES, "encoder_hidden_size": FEATURES,
}  # fmt: skip


def awake(net: Any, seed: int = 1) -> Any:
    """Random weights large enough to tell one wiring from another."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    return net.eval()


def model(**changes: Any) -> ImageText:
    return awake(ImageText(CONFIG | changes))


def features(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, FEATURES, generator=torch.Generator().manual_seed(seed))


def words(*lengths: int, length: int = 6, seed: int = 0) -> Tensor:
    """A text of each length, filled up with −1."""
    ids = torch.randint(VOCABULARY - 1, (len(lengths), length), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(torch.arange(length) >= torch.tensor(lengths)[:, None], -1)


def blip2(kind: Any = transformers.Blip2ForImageTextRetrieval) -> Any:
    """transformers' own at random weights, its picture and language parts as small as may be."""
    vision = {"hidden_size": FEATURES, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 20, "word_embed_proj_dim": 16, "max_position_embeddings": 8}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision, text_config=text, num_query_tokens=QUERIES, image_text_hidden_size=8,
        qformer_config=THEIRS | {"use_qformer_text_input": kind is transformers.Blip2ForImageTextRetrieval},
    )  # fmt: skip
    return awake(kind(config))


def instruct_blip() -> Any:
    config = blip2().config
    parts = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    whole = transformers.InstructBlipConfig(**parts, qformer_config=THEIRS, num_query_tokens=QUERIES)
    return awake(transformers.InstructBlipForConditionalGeneration(whole))


def loaded(theirs: Any, path: Path) -> ImageText:
    """Ours from their weights, through a file."""
    save_file({name: p.contiguous().clone() for name, p in theirs.state_dict().items()}, path / "model.safetensors")
    return load_qformer(path / "model.safetensors", heads=HEADS)


# equal to transformers'


@torch.no_grad()
def test_queries_alone_are_those_of_blip2(tmp_path: Path) -> None:
    theirs = blip2(transformers.Blip2Model)
    ours = loaded(theirs, tmp_path)
    assert ours.config | {"vocabulary": 0, "places": 0, "contrast_dim": 0, "match": False} == ours.config
    found, said = ours.qformer(features())
    tokens = theirs.query_tokens.expand(2, -1, -1)
    wanted = theirs.qformer(query_embeds=tokens, encoder_hidden_states=features()).last_hidden_state
    assert said.shape == (2, 0, WIDTH)
    assert (found - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_contrast_and_match_are_those_of_blip2(tmp_path: Path) -> None:
    theirs, ids = blip2(), words(6, 4)
    ours = loaded(theirs, tmp_path)
    text = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    seen = theirs.vision_model(pixels).last_hidden_state
    contrast = theirs(pixels, **text)
    assert (ours.images(seen) - contrast.image_embeds).abs().max() < 1e-5
    assert (ours.texts(ids) - contrast.text_embeds).abs().max() < 1e-5
    match = theirs(pixels, **text, use_image_text_matching_head=True)
    assert (ours.matches(seen, ids) - match.logits_per_image).abs().max() < 1e-5


@torch.no_grad()
def test_queries_that_read_are_those_of_instruct_blip(tmp_path: Path) -> None:
    theirs, ids = instruct_blip(), words(6, 4)
    ours = loaded(theirs, tmp_path)
    there = torch.cat([torch.ones(2, QUERIES), (ids >= 0).float()], dim=1)
    wanted = theirs.qformer(
        input_ids=ids.clamp(min=0), attention_mask=there, query_embeds=theirs.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=features(),
    ).last_hidden_state  # fmt: skip
    found = torch.cat(ours.qformer(features(), ids), dim=1)
    assert ((found - wanted) * there[..., None]).abs().max() < 1e-5


def test_at_the_papers_size_it_has_the_papers_parameters() -> None:
    """188 M (section 3.1), with the heads of the first stage on features of ViT-g."""
    sizes = {"feature_dim": 1408, "queries": 32, "depth": 12, "heads": 12, "width": 768, "inner": 3072,
             "vocabulary": 30_523, "places": 512, "contrast_dim": 256}  # fmt: skip
    with torch.device("meta"):
        net = ImageText(CONFIG | sizes)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(188e6, rel=0.01)


# who sees whom


@torch.no_grad()
@pytest.mark.parametrize("mask", ["unimodal", "bidirectional", "causal"])
def test_what_must_not_be_seen_changes_nothing(mask: Mask) -> None:
    """A word is changed, and then the picture: what becomes of which query and word differs?"""
    net, ids, place = model().qformer, words(6, 6), 3
    other = ids.clone()
    other[:, place] = (ids[:, place] + 1) % (VOCABULARY - 1)
    plain = torch.cat(net(features(), ids, mask), dim=1)
    by_word = (torch.cat(net(features(), other, mask), dim=1) - plain).abs().amax(dim=(0, 2)) > 1e-6
    by_picture = (torch.cat(net(features(seed=5), ids, mask), dim=1) - plain).abs().amax(dim=(0, 2)) > 1e-6
    if mask == "unimodal":
        assert not by_word[:QUERIES].any() and by_word[QUERIES:].all()
        assert by_picture[:QUERIES].all() and not by_picture[QUERIES:].any()
    elif mask == "causal":
        assert not by_word[: QUERIES + place].any() and by_word[QUERIES + place :].all()
        assert by_picture.all()
    else:
        assert by_word.all() and by_picture.all()


@torch.no_grad()
def test_apart_queries_and_words_are_as_together_under_the_mask_of_contrast() -> None:
    net, ids = model().qformer, words(6, 3)
    asked, said = net(features(), ids, "unimodal")
    assert torch.allclose(asked, net(features())[0], atol=1e-5)
    assert torch.allclose(said, net(words=ids, mask="unimodal")[1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["unimodal", "bidirectional", "causal"])
def test_what_fills_up_a_text_changes_nothing(mask: Mask) -> None:
    net, ids = model().qformer, words(4, 4)
    longer = F.pad(ids, (0, 5), value=-1)
    for some, more in zip(net(features(), ids, mask), net(features(), longer, mask), strict=True):
        assert torch.allclose(some[:, :4], more[:, :4], atol=1e-5)


@torch.no_grad()
def test_every_second_block_looks() -> None:
    assert [block.look is not None for block in model().qformer.blocks] == [True, False] * (DEPTH // 2)


def test_words_that_it_cannot_read_are_refused() -> None:
    with pytest.raises(ms.MahlstickError, match="17 words are more than the 16"):
        model().qformer(words=words(17, length=17))
    with pytest.raises(ms.MahlstickError, match="reads no words"):
        QFormer(FEATURES, 2, 1, 2, 8)(features(), words(6, 6))
    with pytest.raises(ms.MahlstickError, match="cannot have 5 heads"):
        QFormer(FEATURES, 2, 1, 5, 8)


# its heads


@torch.no_grad()
def test_captions_are_the_likeliest_words_one_after_the_other() -> None:
    net, end = model(), 7
    found = net.captions(features(), end, length=6)
    for row, ids in enumerate(found):
        said = ids[ids >= 0]
        begun = torch.cat([torch.zeros(1, dtype=torch.long), said])[None]
        logits = net.next_words(features()[row : row + 1], begun)
        assert torch.equal(logits[0, :-1].argmax(dim=-1), said)
        assert (said[:-1] != end).all() and (len(said) == 5 or said[-1] == end)


def test_a_head_that_is_not_there_is_named() -> None:
    net = ImageText(CONFIG | {"contrast_dim": 0, "match": False, "caption": False})
    for ask, name in (
        (lambda: net.images(features()), "image proj"),
        (lambda: net.matches(features(), words(6, 6)), "match head"),
        (lambda: net.next_words(features(), words(6, 6)), "caption head"),
    ):
        with pytest.raises(ms.MahlstickError, match=f"no {name}"):
            ask()


@torch.no_grad()
def test_texts_become_ids_that_say_where_they_end() -> None:
    tokenizer = tiny.tokenizer()
    ids = token_ids(tokenizer, ["ab", ""], len(tokenizer) + 1, 6)
    assert ids.tolist() == [[*tokenizer("ab").input_ids, -1, -1], [*tokenizer("").input_ids, -1, -1, -1, -1]]
    assert token_ids(tokenizer, ["a" * 200], len(tokenizer), 500).shape == (1, 77)
    with pytest.raises(ms.MahlstickError, match=r"knows 514 words and the Q-Former 99: give .* \(tokenizer=\)"):
        token_ids(tokenizer, ["a"], 100, 6)


# files


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contrast_dim": 0, "match": False, "caption": False},
        {"vocabulary": 0, "places": 0, "contrast_dim": 0, "match": False, "caption": False},
    ],
)
def test_saved_and_loaded_it_is_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    net = model(**changes)
    file = formats.write(tmp_path / "run", "qformer", net.config, net.state_dict())
    assert file.name == "qformer.safetensors"
    info = ms.inspect(tmp_path / "run")
    assert (info.kind, info.layout, info.base, info.config) == ("qformer", "transformers", "unknown", net.config)
    again = load_qformer(tmp_path / "run")
    assert again.config == net.config
    assert torch.equal(again.qformer(features())[0], net.qformer(features())[0])


def test_transformers_reads_what_was_saved(tmp_path: Path) -> None:
    net, theirs = model(caption=False), blip2()
    state = load_file(formats.write(tmp_path / "q.safetensors", "qformer", net.config, net.state_dict()))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("vision_model.") for name in missing)


def test_what_no_file_can_tell_is_asked_for(tmp_path: Path) -> None:
    net = model()
    save_file(
        load_file(formats.write(tmp_path / "q.safetensors", "qformer", net.config, net.state_dict())),
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ms.MahlstickError, match=r"heads of its Q-Former \(32 channels\): give heads="):
        load_qformer(tmp_path / "b.safetensors")
    with pytest.raises(ms.MahlstickError, match="is a Q-Former: begin an IP-Adapter with it"):
        ms.load_adapter(tmp_path / "b.safetensors")


# what it learns first


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 99))
def test_negatives_are_others_drawn_by_their_likeness(count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    likeness, own = 2 * torch.randn(count, count, generator=random), torch.eye(count, dtype=torch.bool)
    lots = torch.linspace(0, 1, 2001)[:-1]
    odds = likeness.masked_fill(own, -torch.inf).softmax(dim=1)
    for row in range(count):
        rows = (likeness[row].expand(2000, -1), own[row].expand(2000, -1), lots)
        chosen, there = alignment.hard_negatives(*rows)
        assert there.all() and (chosen != row).all()
        assert (torch.bincount(chosen, minlength=count) / 2000 - odds[row]).abs().max() < 2e-3


def test_who_has_no_other_text_has_no_negative() -> None:
    alike = alignment.same_words(words(4, 4)[:1].expand(2, -1), words(4, 4)[:1].expand(2, -1))
    chosen, there = alignment.hard_negatives(torch.zeros(2, 2), alike, torch.tensor([0.2, 0.9]))
    assert not there.any() and chosen.max() < 2


def test_contrast_is_infonce_and_shares_its_target_among_equal_texts() -> None:
    by_image, by_text = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1))
    hard = alignment.targets(torch.eye(3, dtype=torch.bool))
    wanted = (
        F.cross_entropy(by_image, torch.arange(3), reduction="none")
        + F.cross_entropy(by_text, torch.arange(3), reduction="none")
    ) / 2
    assert torch.allclose(alignment.contrast(by_image, by_text, (hard, hard)), wanted)
    twice = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert alignment.targets(twice)[0].tolist() == [0.5, 0.5, 0]
    soft = alignment.targets(torch.eye(3, dtype=torch.bool), by_image)
    assert torch.allclose(soft, 0.6 * hard + 0.4 * by_image.softmax(dim=1))


def test_wording_counts_the_words_that_are_there() -> None:
    ids, logits = words(6, 3), torch.randn(2, 6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = alignment.wording(logits, ids)
    for row, length in enumerate((6, 3)):
        wanted = F.cross_entropy(logits[row, : length - 1], ids[row, 1:length])
        assert torch.allclose(found[row], wanted)
    assert torch.allclose(
        alignment.wording(logits, ids, logits)[0],
        0.6 * found[0] + 0.4 * torch.distributions.Categorical(logits=logits[0, :5]).entropy().mean(),
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 90, 230), "grey": (128, 128, 128)}
    for i, (name, colour) in enumerate(colours.items()):
        Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(name)
    return folder


def pipe() -> Any:
    return tiny.quiet(StableDiffusionPipeline(**copy.deepcopy(tiny.components("sd1"))))


def config(pictures: Path, out: Path, **fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {
        "task": "qformer", "steps": 4, "batch": 4, "tokens": 3, "depth": 2, "heads": 1, "validate_every": 0,
        "warmup": 1, "checkpoint_every": 2, "held_out": 0, "rate": 2e-3, "cache": str(out.parent / "cache"),
    }  # fmt: skip
    return TrainConfig(data=str(pictures), out=str(out), **sizes | fields)


def batch_of(task: QFormerTask, pictures: Path) -> dict[str, Tensor]:
    rows = [
        task.draw(row, torch.Generator().manual_seed(i)) for i, row in enumerate(task.encode(read_dataset(pictures)))
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_three_losses_are_of_the_pairs_given(pictures: Path, tmp_path: Path) -> None:
    task = QFormerTask(config(pictures, tmp_path / "run"), pipe())
    batch = batch_of(task, pictures)
    losses = task(batch)
    assert losses.shape == (4,)
    losses.sum().backward()
    assert not [name for name, p in task.named_parameters() if p.grad is None], "of the last block's words too"
    net, image, ids = task.net, batch["image"], batch["words"]
    likeness = task.log_scale.exp() * similarity(net.images(image), net.texts(ids))
    own = torch.arange(4)
    itc = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    eye = torch.eye(4, dtype=torch.bool)
    text, _ = alignment.hard_negatives(likeness, eye, batch["lots"][:, 0])
    other, _ = alignment.hard_negatives(likeness.T, eye, batch["lots"][:, 1])
    yes, no = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    itm = (F.cross_entropy(net.matches(image, ids), yes) + F.cross_entropy(net.matches(image, ids[text]), no)
           + F.cross_entropy(net.matches(image[other], ids), no)) / 3  # fmt: skip
    itg = alignment.wording(net.next_words(image, ids), ids).mean()
    assert float(losses.detach().mean()) == pytest.approx(float((itc + itm + itg).detach()), abs=1e-5)


def _learn_half(rank: int, task: QFormerTask, batch: dict[str, Tensor], folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    task({name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}).mean().backward()
    for p in task.parameters():
        torch.distributed.all_reduce(p.grad)
    torch.save([p.grad / 2 for p in task.parameters()], folder / f"{rank}.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_learn_what_one_learns_from_all_rows(pictures: Path, tmp_path: Path) -> None:
    task = QFormerTask(config(pictures, tmp_path / "run"), pipe()).train()
    batch = batch_of(task, pictures)
    torch.multiprocessing.start_processes(_learn_half, (task, batch, tmp_path), nprocs=2, start_method="fork")
    task(batch).mean().backward()
    for p, found in zip(task.parameters(), torch.load(tmp_path / "1.pt"), strict=True):
        torch.testing.assert_close(found, p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_run_in_two_parts_ends_with_the_same_bits(momentum: float, pictures: Path, tmp_path: Path) -> None:
    whole = train(config(pictures, tmp_path / "whole", momentum=momentum), pipe())
    train(config(pictures, tmp_path / "parts", momentum=momentum, steps=2), pipe())
    parts = train(config(pictures, tmp_path / "parts", momentum=momentum), pipe())
    one, other = (load_file(folder / "qformer.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_qformer(whole).config["vocabulary"] == 515


def test_the_slow_model_is_an_average_that_goes_on_with_the_run(pictures: Path, tmp_path: Path) -> None:
    task = QFormerTask(config(pictures, tmp_path / "run", momentum=0.75), pipe())
    assert task.slow is not None and not any(p.requires_grad for p in task.slow.parameters())
    before = task.net.qformer.queries.detach().clone()
    with torch.no_grad():
        task.net.qformer.queries.add_(1)
    task.stepped()
    assert torch.allclose(task.slow.qformer.queries, before + 0.25)
    assert any(name.startswith("slow.") for name in task.state_dict())


def test_it_learns_four_colours_and_an_adapter_begins_with_it(pictures: Path, tmp_path: Path) -> None:
    run = train(config(pictures, tmp_path / "run", steps=70), pipe())
    task = QFormerTask(config(pictures, tmp_path / "more", start=str(run)), pipe())
    batch = batch_of(task, pictures)
    with torch.no_grad():
        found = similarity(task.net.images(batch["image"]), task.net.texts(batch["words"]))
        match = task.net.matches(batch["image"], batch["words"]).argmax(dim=1)
    assert found.argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert match.float().mean() >= 0.75
    assert task.sample(read_dataset(pictures))[0] == {"recall_at_1": 1.0}
    for projector in ("qformer", "instruct_qformer"):
        second: dict[str, Any] = {
            "task": "ip-adapter",
            "projector": projector,
            "start": str(run),
            "steps": 1,
            "rate": 1e-9,
        }
        adapter = ms.IPAdapter.from_pretrained(train(config(pictures, tmp_path / projector, **second), pipe()))
        assert adapter.config["projector"] == projector and adapter.config["tokens"] == 3
        if adapter.reads:  # with the tokenizer that it learned with
            assert torch.equal(adapter.words(["a red disc"]), adapter.words(["a red disc"], tiny.tokenizer()))
        assert (adapter.tokenizer is not None) == adapter.reads
        begun: Any = adapter.image_proj
        assert torch.allclose(begun.qformer(batch["image"])[0], task.net.qformer(batch["image"])[0], atol=1e-5)
    with pytest.raises(ms.MahlstickError, match="is a Q-Former; give --projector qformer or instruct_qformer"):
        train(config(pictures, tmp_path / "linear", task="ip-adapter", start=str(run)), pipe())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 1}, "batch: a qformer tells pictures of a batch apart"),
        ({"tokenizer": "/nowhere"}, "no tokenizer could be loaded from /nowhere"),
        ({"task": "lora", "momentum": 0.9}, "momentum is for a qformer"),
        ({"task": "lora", "tokenizer": "here"}, "tokenizer is for what reads beside the base"),
    ],
)
def test_what_does_not_go_together_is_refused(
    fields: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ms.MahlstickError, match=message):
        train(config(pictures, tmp_path / "run", **fields), pipe())
