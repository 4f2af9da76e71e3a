"""Style libraries: what they find, what they keep through kills and changes, and image prompts that search them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mahlstick as ms
from benchmarks.tiny import WIDTH, feature_extractor, image_encoder, motion_adapter, tokenizer, unet, unet_inputs
from mahlstick import cli
from mahlstick.pipelines import library as module
from mahlstick.pipelines.generate import generate, looked_up, replay
from mahlstick.pipelines.library import Library, Report, Towers
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import read_recipe
from mahlstick.pipelines.request import Found, ImagePromptSpec, Request
from mahlstick.pipelines.video import video_comment
from tests import tiny
from tests.tiny import picture

LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = LAYERS | {"image_size": 32, "patch_size": 8}
CLOSE = 1e-3  # features are kept as halves


def save_clip(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    text = LAYERS | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    for part in (transformers.CLIPModel(config), feature_extractor(), tokenizer()):
        part.save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = LAYERS | {"vocab_size": 514, "projection_size": WIDTH}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    for part in (model, processor, tokenizer()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded image encoder alone, which reads no words."""
    folder = tmp_path_factory.mktemp("eyes")
    for part in ("image_encoder", "feature_extractor", "model_index.json"):
        (folder / part).symlink_to(embedded_folder() / part)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


CAPTIONS = {
    "fox": ["a fox in watercolour"],
    "owl": ["an owl, cut from paper"],
    "cat": ["a cat in watercolour", "a sleeping cat"],
    "tree": ["a bare tree, woodcut"],
}


def save_pictures(folder: Path, captions: dict[str, list[str]] = CAPTIONS) -> dict[Path, list[str]]:
    """A picture of noise for each name, with its captions."""
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(captions):
        picture(seed=seed).save(folder / f"{name}.png")
    return {folder / f"{name}.png": texts for name, texts in captions.items()}


def contents(path: Path) -> list[tuple[Any, ...]]:
    """Everything that a library's file holds of its pictures."""
    with sqlite3.connect(path) as data:
        return data.execute("SELECT path, sha256, captions, image, words FROM pictures ORDER BY path").fetchall()


# what is found


@torch.no_grad()
@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_similarities_are_those_of_the_whole_model(save: Callable[[Path], Path], here: Path) -> None:
    folder = save(here / "encoder")
    given = save_pictures(here / "pictures")
    library = Library("library.sqlite", str(folder))
    library.add(given, progress=False)

    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def texts(words: list[str]) -> torch.Tensor:
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer()(words, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_text_features(ids.input_ids).pooler_output)

    pixels = processor([Image.open(path) for path in given], return_tensors="pt")
    images = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output)
    words = texts(["a blue fox"])[0]
    looks = dict(zip(CAPTIONS, (images @ words).tolist(), strict=True))
    captions = {name: (texts(each) @ words).max().item() for name, each in CAPTIONS.items()}
    like = dict(zip(CAPTIONS, (images @ images[1]).tolist(), strict=True))
    hits = library.search("a blue fox", like=here / "pictures" / "owl.png")
    assert len(hits) == len(CAPTIONS)
    for hit in hits:
        name = Path(hit.name).stem
        assert hit.similarities["picture"] == pytest.approx(looks[name], abs=CLOSE)
        assert hit.similarities["caption"] == pytest.approx(captions[name], abs=CLOSE)
        assert hit.similarities["like"] == pytest.approx(like[name], abs=CLOSE)
    assert [hit.name for hit in library.search(like=here / "pictures" / "owl.png", count=2)] == [
        f"pictures/{name}.png" for name in sorted(like, key=lambda each: -like[each])[:2]
    ]


def test_a_pipeline_reads_with_the_tower_beside_it(here: Path) -> None:
    """Its own text encoder serves the UNet, and need not know the image encoder."""
    clip = transformers.CLIPModel.from_pretrained(save_clip(here / "clip"))
    config = clip.config.vision_config
    config.projection_dim = WIDTH
    torch.manual_seed(3)
    folder = here / "pipe"
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    feature_extractor().save_pretrained(folder / "feature_extractor")
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "text_encoder").mkdir()
    (folder / "model_index.json").write_text("{}")
    assert Towers.load(str(folder)).text is None
    without = module._encoder_print(str(folder))
    tower = transformers.CLIPTextModel(clip.config.text_config)
    tower.save_pretrained(folder / "clip" / "text_encoder")
    assert module._encoder_print(str(folder)) != without
    library = Library(encoder="pipe")
    library.add(save_pictures(here / "pictures"), progress=False)
    assert library.search("fox")[0].similarities.keys() == {"picture", "caption"}
    (here / "other").mkdir()
    os.chdir(here / "other")
    assert Library(here / module.LIBRARY).search("fox"), "its encoder is found from anywhere"


def test_a_hub_id_is_fetched_before_it_is_asked_for_its_commit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("_reads", "_encoder_print"):
        monkeypatch.setattr(module, name, lambda encoder, name=name: asked.append(name))
    Library(encoder="owner/clip").add([], progress=False)
    assert asked == ["_reads", "_encoder_print"]


def test_a_folder_called_as_the_embedded_encoder_is_not_taken_for_it(here: Path) -> None:
    (here / "embedded").mkdir()
    Library("library.sqlite").add(save_pictures(here / "pictures", {"fox": []}), progress=False)
    with sqlite3.connect("library.sqlite") as data:
        assert data.execute("SELECT value FROM facts WHERE name = 'encoder'").fetchone() == ("embedded",)


def test_words_find_captions_where_the_encoder_reads_none(here: Path, eyes: str) -> None:
    library = Library(encoder=eyes)
    library.add(save_pictures(here / "pictures"), progress=False)
    searcher = Library()
    hits = searcher.search("watercolour fox", count=3)
    assert [Path(hit.name).stem for hit in hits] == ["fox", "cat", *[Path(hits[2].name).stem]]
    assert set(hits[0].similarities) == {"caption"} and hits[0].similarity > hits[1].similarity > hits[2].similarity
    assert "_towers" not in vars(searcher), "no encoder was loaded"
    assert [Path(hit.name).stem for hit in searcher.search("sleeping cat", count=1)] == ["cat"]
    (self,) = searcher.search(like=here / "pictures" / "tree.png", count=1)
    assert self.name == "pictures/tree.png" and self.similarity == pytest.approx(1, abs=CLOSE)


def test_a_picture_without_captions_is_not_behind_all_that_have_some(here: Path, clip: str) -> None:
    given = save_pictures(here / "pictures", {f"{i}": [f"{i} {i}"] if i else [] for i in range(12)})
    library = Library(encoder=clip)
    library.add(given, progress=False)
    assert "caption" not in next(h for h in library.search("x", count=12) if h.name.endswith("/0.png")).similarities
    places = set()
    for words in "abcdefgh":
        places.add([hit.name for hit in library.search(words, count=12)].index("pictures/0.png"))
    assert min(places) < 6, "behind those whose caption is like the words, before those whose is not"
    assert module._standard(np.array([1, np.nan, 3])).tolist() == [-1, 0, 1]


@given(st.lists(st.text("abc 狐狸ä", max_size=12), min_size=1, max_size=6))
def test_likeness_of_words(captions: list[str]) -> None:
    found = module._word_similarities(captions[0], [[caption] for caption in captions])
    assert ((found >= 0) & (found <= 1 + 1e-9)).all()
    assert found[0] == pytest.approx(1 if captions[0].split() else 0)
    shuffled = module._word_similarities(" ".join(reversed(captions[0].split())), [[c] for c in captions])
    assert shuffled == pytest.approx(found) or any("狐" <= c <= "狸" or c in "狐狸" for c in captions[0])


def test_words_of_scripts_without_spaces_are_found_one_by_one() -> None:
    found = module._word_similarities("水彩狐狸", [["一只水彩画的狐狸"], ["一只木刻的猫"], []])
    assert found[0] > 0.5 > found[1] and np.isnan(found[2])
    assert list(module._word_similarities("FOX", [["the Fox"], ["foxes"]]) > 0) == [True, False]


# what is kept


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were encoded at once, each time."""
    counts: list[int] = []
    images = Towers.images

    def counted(self: Towers, pictures: Any) -> Any:
        counts.append(len(pictures))
        return images(self, pictures)

    monkeypatch.setattr(Towers, "images", counted)
    return counts


def test_only_what_is_new_is_encoded(here: Path, encoded: list[int]) -> None:
    given = save_pictures(here / "pictures")
    first = here / "pictures" / "fox.png"
    assert Library().add(given, progress=False) == Report(added=4)
    assert Library().add(given, progress=False) == Report(known=4)
    os.utime(first)
    assert Library().add(given, progress=False) == Report(known=4)
    (here / "copy.png").write_bytes(first.read_bytes())
    assert Library().add([here / "copy.png"], progress=False) == Report(known=1)
    first.rename(here / "pictures" / "moved.png")
    given[here / "pictures" / "moved.png"] = given.pop(first)
    assert Library().add(given, progress=False) == Report(known=3, changed=1)
    assert sum(encoded) == 4
    assert {entry.name for entry in Library().pictures()} == {
        f"pictures/{n}.png" for n in ("moved", "owl", "cat", "tree")
    }

    picture(seed=9).save(here / "pictures" / "owl.png")
    given[here / "pictures" / "cat.png"] = ["a cat in oil"]
    assert Library().add(given, progress=False) == Report(known=2, changed=2)
    assert sum(encoded) == 6
    assert Library().search("oil", count=1)[0].captions == ("a cat in oil",)
    fresh = Library("fresh.sqlite")
    fresh.add(given, progress=False)
    for one, other in zip(contents(here / "fresh.sqlite"), contents(here / "library.sqlite"), strict=True):
        assert one[:3] == other[:3]
        assert np.allclose(*(module._features([row[3]]) for row in (one, other)), atol=CLOSE)  # batches differ


def test_captions_stay_where_none_are_given(here: Path, encoded: list[int]) -> None:
    given = save_pictures(here / "pictures")
    Library().add(given, progress=False)
    before, count = contents(here / "library.sqlite"), sum(encoded)
    fox = next(iter(given))
    os.utime(fox, ns=(1, 1))
    assert Library().add([fox, *list(given)[1:]], progress=False).known == len(given)
    assert [one[:3] for one in contents(here / "library.sqlite")] == [one[:3] for one in before]
    assert sum(encoded) == count


def test_two_copies_at_once_are_one_picture(here: Path) -> None:
    given = [here / name for name in ("a.png", "b.png")]
    for path in given:
        picture(seed=1).save(path)
    assert Library().add(given, progress=False) == Report(added=1, known=1)
    assert [entry.name for entry in Library().pictures()] == ["a.png"]


def test_pictures_that_changed_places_are_found_where_they_are(here: Path) -> None:
    given = save_pictures(here / "pictures")
    fox, owl, cat = (here / "pictures" / f"{name}.png" for name in ("fox", "owl", "cat"))
    Library().add(given, progress=False)
    fox.rename(here / "other.png")
    owl.rename(fox)
    (here / "other.png").rename(owl)
    cat.write_bytes(fox.read_bytes())  # and this is a copy now
    Library().add(given, progress=False)
    fresh = Library("fresh.sqlite")
    fresh.add(given, progress=False)
    assert {entry.state for entry in Library().pictures()} == {"here"}
    assert [one[:3] for one in contents(here / "library.sqlite")] == [
        one[:3] for one in contents(here / "fresh.sqlite")
    ]


def test_a_library_whose_writer_was_killed_in_the_midst_of_writing_is_read(here: Path) -> None:
    Library().add(save_pictures(here / "pictures"), progress=False)
    child = os.fork()
    if child == 0:  # pragma: no cover
        data = sqlite3.connect(here / "library.sqlite")
        data.execute("PRAGMA cache_size = 1")  # so that unfinished pages reach the disk
        data.execute("UPDATE pictures SET captions = ?", ["x" * 100_000])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (here / "library.sqlite-journal").stat().st_size
    assert len(Library()) == 4 and Library().search("fox", count=1)[0].captions == ("a fox in watercolour",)


@pytest.mark.parametrize("dies_at", [0, 17, 30])
def test_killed_at_any_time_it_goes_on_and_holds_the_same(here: Path, eyes: str, dies_at: int) -> None:
    given = save_pictures(here / "pictures", {f"{i:02}": [f"number {i}"] for i in range(36)})
    child = os.fork()
    if child == 0:  # pragma: no cover
        calls, blob = iter(range(10_000)), module._blob

        def dying(vectors: Any) -> bytes:
            if next(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return blob(vectors)

        module._blob = dying
        Library("killed.sqlite", eyes).add(given, progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    held = len(Library("killed.sqlite"))
    assert held == dies_at // 16 * 16, "whole transactions, and nothing else"
    assert Library("killed.sqlite", eyes).add(given, progress=False) == Report(added=36 - held, known=held)
    if dies_at == 17:
        Library("whole.sqlite", eyes).add(given, progress=False)
        assert contents(here / "killed.sqlite") == contents(here / "whole.sqlite")


def test_what_is_no_picture_is_left_out_and_told(here: Path) -> None:
    given = save_pictures(here / "pictures")
    (here / "pictures" / "cat.png").write_bytes(b"no picture")
    report = Library().add([*given, here / "gone.png"], progress=False)
    assert report.added == 3
    assert [Path(name).name for name, _ in report.skipped] == ["cat.png", "gone.png"]
    assert "is not a picture" in report.skipped[0][1]


def test_missing_and_changed_pictures_are_told_and_passed_over(here: Path, eyes: str) -> None:
    Library(encoder=eyes).add(save_pictures(here / "pictures"), progress=False)
    (here / "pictures" / "fox.png").unlink()
    picture(seed=9).save(here / "pictures" / "cat.png")
    states = {Path(entry.name).stem: entry.state for entry in Library().pictures()}
    assert states == {"fox": "missing", "cat": "changed", "owl": "here", "tree": "here"}
    with pytest.warns(UserWarning) as told:
        (chosen,) = Library().references("fox in watercolour")
    assert chosen.state == "here"
    assert sorted(str(one.message).partition("; ")[0].rpartition("/")[2] for one in told) == [
        "cat.png: has changed since it was added",
        "fox.png: is gone since it was added to the library",
    ]
    with (
        pytest.warns(UserWarning),
        pytest.raises(ms.MahlstickError, match=r"every picture near .* has changed or is gone"),
    ):
        Library().references("watercolour", least=0.1)
    assert Library().remove(missing=True) == ["pictures/fox.png"]


def test_a_library_moves_with_its_pictures(here: Path) -> None:
    (here / "one").mkdir()
    given = save_pictures(here / "one" / "pictures")
    outside = here / "outside.png"
    picture(seed=9).save(outside)
    Library("one/library.sqlite").add({**given, outside: ["outside"]}, progress=False)
    (here / "one").rename(here / "two")
    entries = Library("two/library.sqlite").pictures()
    assert {entry.state for entry in entries} == {"here"}
    assert {entry.name for entry in entries} == {str(outside)} | {f"pictures/{name}.png" for name in CAPTIONS}


def test_removing(here: Path) -> None:
    given = save_pictures(here / "pictures")
    library = Library()
    library.add(given, progress=False)
    with pytest.raises(ms.MahlstickError, match=r"holds no picture wolf\.png"):
        library.remove(["pictures/fox.png", "wolf.png"])
    assert len(library) == 4
    digest = next(entry.sha256 for entry in library.pictures() if "owl" in entry.name)
    assert library.remove(["pictures/fox.png", digest[:10]]) == ["pictures/fox.png", "pictures/owl.png"]
    assert library.remove(["pictures"]) == ["pictures/cat.png", "pictures/tree.png"]
    assert all(path.exists() for path in given)


# what does not do


def test_another_encoder_is_refused(here: Path, clip: str) -> None:
    given = save_pictures(here / "pictures")
    mine = save_clip(here / "mine", seed=1)
    Library(encoder=str(mine)).add(given, progress=False)
    with pytest.raises(ms.MahlstickError, match=r"its features are by .*mine \(sha256:.*; give that encoder"):
        Library(encoder=clip).search("fox")
    with pytest.raises(ms.MahlstickError, match="its features are by"):
        Library(encoder="embedded").add(given, progress=False)
    mine.rename(here / "elsewhere")
    assert Library(encoder=str(here / "elsewhere")).search("fox")
    with pytest.raises(ms.MahlstickError, match="mine"):
        Library().search("fox")
    save_clip(mine, seed=2)
    with pytest.raises(ms.MahlstickError, match=r"mine is sha256:.* here"):
        Library().search("fox")


def test_errors_name_the_way_out(here: Path, eyes: str) -> None:
    (here / "notes.txt").write_text("no library " * 200)
    with sqlite3.connect("other.sqlite") as other:
        other.execute("CREATE TABLE things (name TEXT)")
    picture().save("bare.png")
    Library("bare.sqlite", eyes).add(["bare.png"], progress=False)
    Library("empty.sqlite").add([], progress=False)
    for library, message in {
        "none.sqlite": "none.sqlite: no such library; make one with mahlstick library add FOLDER --into none.sqlite",
        "notes.txt": "cannot be used as a library",
        "other.sqlite": "is no library of mahlstick's",
        "empty.sqlite": "is empty; fill it with mahlstick library add",
        "bare.sqlite": "no captions, and its encoder .* reads no words; search with a picture, add captions",
    }.items():
        with pytest.raises(ms.MahlstickError, match=message):
            Library(library).search("fox")
    with pytest.raises(ms.MahlstickError, match="there is nothing to search for"):
        Library("bare.sqlite").search(" ")
    with pytest.raises(ms.MahlstickError, match=r"is no library|cannot be used"):
        Library("other.sqlite").add(["bare.png"], progress=False)
    with pytest.raises(ms.MahlstickError, match=r"bare.png/new.sqlite: cannot be written .*; give another place"):
        Library("bare.png/new.sqlite").add(["bare.png"], progress=False)


def test_nothing_near_enough_says_what_comes_nearest(here: Path) -> None:
    Library().add(save_pictures(here / "pictures"), progress=False)
    assert Library().search("watercolour wolf", least=0.99) == []
    with pytest.raises(
        ms.MahlstickError, match=r"nothing .* near enough to 'watercolour wolf': .* with 0\.\d\d, and least"
    ):
        Library().references("watercolour wolf", least=0.99)


# image prompts that search


@torch.no_grad()
def test_an_image_prompt_finds_its_references_once(here: Path) -> None:
    given = save_pictures(here / "pictures")
    library = Library()
    library.add(given, progress=False)
    network, inputs = unet("sd1"), unet_inputs("sd1")
    ip = ms.IPAdapter.from_unet(network, tokens=2, feature_dim=WIDTH)
    ip.use_encoder(image_encoder(), feature_extractor())
    unit = ms.ImagePrompt(ip, search="watercolour", library=library, count=2)
    outputs = []
    for each in (unit, ms.ImagePrompt(ip, [[here / "pictures" / "fox.png", here / "pictures" / "cat.png"]])):
        with ms.attach(network, each):
            outputs.append(network(**inputs).sample)
    assert torch.allclose(*outputs, atol=1e-5)
    assert {Path(hit.name).stem for hit in unit.found or []} == {"fox", "cat"}

    picture(seed=20).save(here / "nearer.png")
    library.add({here / "nearer.png": ["watercolour"]}, progress=False)
    with ms.attach(network, unit):
        assert torch.equal(network(**inputs).sample, outputs[0])
    with ms.attach(network, ms.ImagePrompt(ip, search="watercolour", library="library.sqlite")) as attached:
        assert attached and not torch.allclose(network(**inputs).sample, outputs[0], atol=1e-5)
    with pytest.raises(ms.MahlstickError, match="either images=, video=, features= or search="):
        ms.attach(network, ms.ImagePrompt(ip, search="watercolour", images=[here / "nearer.png"]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_models(tmp_path_factory.mktemp("models"))


def test_a_recipe_says_what_was_found_and_makes_it_again(here: Path, models: Path, eyes: str) -> None:
    Library(encoder=eyes).add(save_pictures(here / "pictures"), progress=False)
    prompt = {"adapter": str(models / "ip"), "search": "fox in watercolour", "library": "library.sqlite"}
    request = Request(prompt="x", base=str(models / "base"), steps=1, seed=3, image_prompts=[prompt])
    assert Request.from_json(request.to_json()) == request
    result = generate(request, progress=False)
    (path,) = result.save(here / "out.png")
    (kept,) = read_recipe(path).request.image_prompts
    expected = next(entry for entry in Library().pictures() if "fox" in entry.name)
    assert kept.found == [Found(file="pictures/fox.png", sha256=expected.sha256)]

    picture(seed=30).save(here / "nearer.png")
    Library().add({here / "nearer.png": ["fox in watercolour"]}, progress=False)
    assert np.array_equal(replay(path, progress=False)[0], result.images[0])
    assert not np.array_equal(generate(request, progress=False).images[0], result.images[0]), "the library has grown"

    told = Request(prompt="x", image_prompts=[{**prompt, "found": [kept.found[0].model_dump()]}])
    (again,) = (looked_up(spec, "image_prompts[0]") for spec in told.image_prompts)
    assert again.images == [str(here / "pictures" / "fox.png")]
    (here / "pictures" / "fox.png").rename(here / "elsewhere.png")
    with pytest.raises(
        ms.MahlstickError, match=r"image_prompts\[0\]: pictures/fox.png: was found in library.sqlite before"
    ):
        looked_up(told.image_prompts[0], "image_prompts[0]")
    Library().add({here / "elsewhere.png": CAPTIONS["fox"]}, progress=False)
    assert looked_up(told.image_prompts[0], "").images == [str(here / "elsewhere.png")]
    (here / "library.sqlite").unlink()
    assert np.array_equal(replay(path, progress=False)[0], result.images[0]), "the recipe holds the picture itself"


def test_a_clip_keeps_what_was_found(here: Path, models: Path) -> None:
    Library().add(save_pictures(here / "pictures"), progress=False)
    module = motion_adapter(unet("sd1")).save_pretrained(here / "module")
    prompt = {"adapter": str(models / "ip"), "search": "fox in watercolour"}
    request = ms.VideoRequest(
        prompt="x", base=str(models / "base"), motion=str(module), frames=2, steps=1, seed=3, image_prompts=[prompt]
    )
    first = ms.animate(request, "clip.webp", device="cpu", progress=False)
    kept = ms.VideoRequest.from_json(video_comment("clip.webp") or "")
    assert kept == first.request and kept.image_prompts[0].found[0].file == "pictures/fox.png"
    picture(seed=30).save(here / "nearer.png")
    Library().add({here / "nearer.png": ["fox in watercolour"]}, progress=False)
    again = ms.animate(kept, "again.webp", device="cpu", progress=False)
    assert Path("again.webp").read_bytes() == Path("clip.webp").read_bytes()
    assert again.request.image_prompts == first.request.image_prompts


def test_an_image_prompt_has_pictures_or_words() -> None:
    for fields, message in (
        ({}, "images: give at least one picture, or search"),
        ({"images": ["a.png"], "search": "fox"}, "images: search is given too; keep one"),
        ({"search": ""}, "search: "),
        ({"search": "fox", "found": [{"file": "a.png", "sha256": "12"}]}, r"found\[0\].sha256: "),
    ):
        with pytest.raises(ms.MahlstickError, match=message):
            ImagePromptSpec(**fields)


# the commands


def test_the_commands(here: Path, capsys: pytest.CaptureFixture[str], eyes: str) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["library", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    for path, captions in save_pictures(here / "pictures").items():
        path.with_suffix(".txt").write_text("\n".join(captions))
    picture(seed=9).save("single.png")
    Path("single.txt").write_text("a lone wolf")
    Path("broken.png").write_text("x")
    code, out, err = run("add", "pictures", "single.png", "broken.png", "--into", "styles.sqlite", "--encoder", eyes)
    assert (code, out) == (0, "styles.sqlite  5 pictures added, 0 changed, 0 known, 5 in all\n")
    assert "warning: broken.png is left out: " in err
    code, out, _ = run("search", "a lone wolf", "--library", "styles.sqlite", "--show", "grid.png", "--count", "2")
    header, first, _ = out.splitlines()
    assert header.split() == ["picture", "similarity", "caption"]
    assert first.split(maxsplit=2) == ["single.png", "1.00", "a lone wolf"]
    with Image.open("grid.png") as grid:
        assert grid.width > 400
    code, out, _ = run("search", "--like", "single.png", "--library", "styles.sqlite", "--json", "--least", "0.9999")
    assert next(iter(json.loads(out)))["similarities"]["like"] == pytest.approx(1, abs=CLOSE)
    assert run("search", "wolf", "--library", "styles.sqlite", "--least", "2")[0] == 2

    Path("single.png").unlink()
    code, out, err = run("list", "--library", "styles.sqlite")
    assert "single.png (missing)  a lone wolf" in out and "5 pictures, 1 missing" in err
    assert run("remove", "--missing", "pictures/owl.png", "--library", "styles.sqlite")[1] == "2 pictures removed\n"
    assert {row["name"] for row in json.loads(run("list", "--library", "styles.sqlite", "--json")[1])} == {
        f"pictures/{name}.png" for name in ("fox", "cat", "tree")
    }
    assert run("remove", "--library", "styles.sqlite")[0] == 2
    assert run("add", "broken.png")[0] == 2
    picture().save("latin.png")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    assert run("add", "latin.png")[2] == "mahlstick: latin.txt is not UTF-8 text; save it again as UTF-8\n"
    assert run("add", "nowhere")[2] == "mahlstick: nowhere: no such picture or folder; check the path\n"
    for command in ("add", "search", "list", "remove"):
        assert f"mahlstick library {command} " in run(command, "--help")[1]


def test_generate_searches_for_what_begins_with_a_question_mark(
    here: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Library().add(save_pictures(here / "pictures"), progress=False)
    base = ["generate", "-p", "x", "--base", str(models / "base"), "--steps", "1", "--seed", "3"]
    asked = f"{models / 'ip'}=?fox in watercolour:0.7"
    assert cli.main([*base, "--image-prompt", asked, "--least", "0.9", "--out", "o.png"]) == 0
    assert "pictures/fox.png  was found for 'fox in watercolour'" in capsys.readouterr().err
    (spec,) = read_recipe("o.png").request.image_prompts
    assert (spec.search, spec.scale, spec.least, len(spec.images)) == ("fox in watercolour", 0.7, 0.9, 1)
    assert cli.main([*base, "--image-prompt", "?a zebra", "--least", "0.9"]) == 2
    assert "nothing in it is near enough to 'a zebra'" in capsys.readouterr().err
    assert cli.main([*base, "--library", "library.sqlite"]) == 2
    assert '--library, --least: are for --image-prompt "?WORDS"' in capsys.readouterr().err
