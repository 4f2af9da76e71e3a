"""Grids of pictures that differ in one setting or two."""

from __future__ import annotations

from itertools import chain
from typing import Any

import diffusers
import pytest
from PIL import Image

import mahlstick as ms
from benchmarks import tiny
from mahlstick.errors import MahlstickError
from mahlstick.pipelines import sheet as sheets
from mahlstick.pipelines.compare import Axis, cells, grid, read_grid
from mahlstick.pipelines.recipe import read_recipe
from mahlstick.pipelines.sheet import contact_sheet, strip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))


@pytest.fixture(scope="module")
def request_(pipe: Any) -> ms.Request:
    """Nothing of it is at its default, so that whatever gets lost shows."""
    net = ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    net.load_state_dict(tiny.controlnet("sd1").state_dict())
    ip = ms.IPAdapter.from_unet(pipe.unet, tokens=2, feature_dim=tiny.WIDTH)
    return ms.Request(
        prompt="a red fox",
        negative_prompt="blue",
        seeds=[5, 6, 7],
        batch=3,
        steps=4,
        guidance=3.0,
        init=tiny.picture(1),
        strength=0.6,
        controls=[{"adapter": net, "image": tiny.picture(2), "annotator": "canny", "scale": 5, "start": 0.1}],
        image_prompts=[{"adapter": ip, "images": [tiny.picture(3)], "scale": 0.7}],
    )


@pytest.mark.parametrize(
    "x, y",
    [
        (("steps", [4, 2]), ("seed", [1, 2])),
        (("controls[0].end", [0.5, 1.0]), ("controls[0].start", [0.0, 0.4])),
        (("scheduler", [None, "euler"]), ("strength", [0.5, 1.0])),
        (("prompt", ["red", "green"]), ("negative_prompt", ["blue", ""])),
        (("guidance", [1, 5]), ("controls[0].mode", ["balanced", "guess"])),
        (("image_prompts[0].blocks", ["style", "all"]), None),
    ],
)
def test_each_picture_is_what_its_request_makes_alone(pipe: Any, request_: ms.Request, x: Any, y: Any) -> None:
    made: list[Any] = []
    comparison = ms.compare(request_, x, y, pipe=pipe, progress=False, on_result=made.append)
    across, down = comparison.recipe.x, comparison.recipe.y
    requests = cells(request_, across, down)
    assert [len(row) for row in comparison.results] == [len(x[1])] * (len(y[1]) if y else 1)
    assert made == [result for row in comparison.results for result in row]
    (alone,) = ms.generate(list(chain(*requests))[-1], pipe=pipe, progress=False).images
    assert made[-1].images[0].tobytes() == alone.tobytes()
    assert len({result.images[0].tobytes() for result in made}) == len(made), "each value has its effect"


def test_what_the_axes_leave_alone_stays(request_: ms.Request) -> None:
    (row,) = cells(request_, Axis(field="controls[0].scale", values=[0.5, -1]))
    for cell, scale in zip(row, (0.5, -1), strict=True):
        assert (cell.seed, cell.seeds, cell.images, cell.batch) == (5, None, 1, 1)
        assert cell.controls[0].model_dump() == request_.controls[0].model_dump() | {"scale": scale}
        own = {"seed", "seeds", "images", "batch", "controls"}
        assert cell.model_dump(exclude=own) == request_.model_dump(exclude=own)


def test_an_open_seed_is_drawn_once(pipe: Any) -> None:
    comparison = ms.compare(ms.Request(prompt="fox", width=64, height=64), ("steps", [1, 2]), pipe=pipe, progress=False)
    first, second = (result.recipe.request.seeds for result in comparison.results[0])
    assert first == second == comparison.recipe.request.seeds


def test_the_saved_grid_makes_itself_again(pipe: Any, request_: ms.Request, tmp_path: Any) -> None:
    x, y = ("controls[0].scale", [0.25]), ("prompt", ["red", "green"])
    comparison = ms.compare(request_, x, y, pipe=pipe, progress=False)
    path = comparison.save(tmp_path / "grid.png")
    kept = read_grid(path)
    assert kept.request.prompt == "a red fox" and kept.request.controls[0].scale == 5
    assert kept.request.seeds == [5] and kept.request.guidance == 3 and kept.request.strength == 0.6
    assert 'Grid: control 1 scale 0.25 × prompt "red", "green"' in Image.open(path).info["parameters"]
    units = {
        "controls": [kept.request.controls[0].model_copy(update={"adapter": request_.controls[0].adapter})],
        "image_prompts": [
            kept.request.image_prompts[0].model_copy(update={"adapter": request_.image_prompts[0].adapter})
        ],
    }
    again = ms.compare(kept.request.model_copy(update=units), kept.x, kept.y, pipe=pipe, progress=False)
    assert again.picture.tobytes() == Image.open(path).tobytes()
    with pytest.raises(MahlstickError, match="is a grid of pictures; give one of them"):
        read_recipe(path)
    with pytest.raises(MahlstickError, match="is one picture; give a grid"):
        read_grid(comparison.results[0][0].save(tmp_path / "one.png")[0])
    with pytest.raises(MahlstickError, match=r"out.jpg: a grid is kept in one PNG"):
        comparison.save(tmp_path / "out.jpg")


@pytest.mark.parametrize(
    "x, y, sentence",
    [
        (("stepz", [1]), None, "field: 'stepz' is nothing that can be compared; did you mean steps?"),
        (("steps", []), None, "values: .*at least 1"),
        (("steps", [2, 0]), None, "steps: should be greater than or equal to 1, not 0"),
        (("steps", ["many"]), None, "steps: should be a valid integer"),
        (("steps", [1]), ("steps", [2]), "x and y: both are the steps"),
        (("controls[1].scale", [1]), None, r"controls\[1\].scale: the request has 1 controls"),
        (("controls[0].end", [0.1]), None, r"controls\[0\]: start 0.1 is not before end 0.1"),
        (("prompt", ["owl", "cat"]), None, "prompt: 'owl' is not in the prompt"),
        (("prompt", ["", "cat"]), None, "prompt: '' is not in the prompt"),
        (("scheduler", ["eulr"]), None, "scheduler 'eulr' is unknown; did you mean euler"),
        (("scheduler", ["lcm_karras"]), None, "LCMScheduler has no use_karras_sigmas"),
        (("controls[0].adapter", ["/none"]), None, "/none"),
        (("steps", [1]), ("strength", [0.5]), "strength: 0.5 of 1 steps leaves no step"),
    ],
)
def test_what_does_not_do_is_told_before_the_first_picture(
    pipe: Any, request_: ms.Request, x: Any, y: Any, sentence: str
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a picture was begun")

    with pytest.raises(MahlstickError, match=sentence):
        ms.compare(request_, x, y, pipe=pipe, progress=False, callback=never)


def test_strength_needs_a_picture() -> None:
    with pytest.raises(MahlstickError, match="strength: nothing is repainted"):
        cells(ms.Request(prompt="fox"), Axis(field="strength", values=[0.5]))


@pytest.mark.parametrize(
    "field, text, values",
    [
        ("steps", "4, 8 ,\n8,16,", [4, 8, 16]),
        ("seed", "1-5", [1, 2, 3, 4, 5]),
        ("seed", "5-1 (+2)", [5, 3, 1]),
        ("steps", "4-20 [5]", [4, 8, 12, 16, 20]),
        ("guidance", "0-1 [5]", [0, 0.25, 0.5, 0.75, 1]),
        ("guidance", "1-2 (+0.5), 7", [1, 1.5, 2, 7]),
        ("controls[0].scale", "-1, -0.5-0.5 [3]", [-1, -0.5, 0, 0.5]),
        ("controls[0].scale", "0.2\uff0c 1", [0.2, 1]),
        ("controls[0].mode", "Balanced, guess", ["balanced", "guess"]),
        ("controls[0].adapter", "Edges", ["/models/edges"]),
        ("scheduler", "own, DPM++ 2M Karras", [None, "DPM++ 2M Karras"]),
        ("prompt", 'red, "blue, green", "" , "a ""b"""', ["red", "blue, green", "", 'a "b"']),
    ],
)
def test_values_are_read_as_a_person_writes_them(field: str, text: str, values: list[Any]) -> None:
    names = {"edges": "/models/edges"} if field.endswith("adapter") else None
    axis = Axis.parse(field, text, names)
    assert axis.values == values
    assert Axis.parse(field, axis.text(names), names) == axis


@pytest.mark.parametrize(
    "field, text, sentence",
    [
        ("controls[0].scale", "0.5, x", "scale: 'x' is no number; write values such as 0.5, 1"),
        ("steps", "2.5", "steps: '2.5' is no whole number; write values such as 4, 8 or 1-5"),
        ("guidance", "nan", "guidance: 'nan' is no number"),
        ("guidance", "1-2 (+0)", "is no number"),
        ("seed", "1-9999999999", "9999999999 values; give at most 100"),
        ("seed", " , ", "seed: give the values to compare, such as 4, 8"),
        ("controls[0].mode", "guess, bold", "mode: 'bold' is unknown; choose from balanced, prompt, control, guess"),
        ("scheduler", "eulr", "did you mean euler"),
    ],
)
def test_values_that_cannot_be_read_are_told(field: str, text: str, sentence: str) -> None:
    with pytest.raises(MahlstickError) as caught:
        Axis.parse(field, text)
    assert sentence in str(caught.value)


def test_a_grid_shows_small_pictures_large_and_many_of_them_small() -> None:
    x, y = Axis(field="steps", values=[1, 2, 3]), Axis(field="seed", values=[1, 2])
    small = grid(x, y, [[tiny.picture(size=16), None, None], [None] * 3])
    assert 3 * 160 < small.width < 3 * 160 + 200 and 2 * 160 < small.height < 2 * 160 + 100
    large = grid(x, y, [[Image.new("RGB", (400, 200))] * 3] * 2)
    assert 1200 < large.width < 1500 and 400 < large.height < 500
    assert grid(x, y, [[Image.new("RGB", (400, 200))] * 3] * 2, side=300).width < 300 + 200
    assert 1200 < grid(x, None, [[Image.new("RGB", (400, 200))] * 3]).width < 1260, "no labels, no place for them"


def test_long_labels_stay_above_their_pictures() -> None:
    def ink(sheet: Image.Image, left: int, right: int) -> bool:
        return (
            sheet.crop((left, 0, right, 30)).convert("L").point(lambda value: 255 * (value < 128)).getbbox() is not None
        )

    cell, white = 100, Image.new("RGB", (100, 100), "white")
    for label in ("a very long label that goes on and on", "W" * 300, "蓝" * 40):
        sheet = contact_sheet([label, ""], [("", [white, None])], cell)
        assert ink(sheet, 12, 112) and not ink(sheet, 113, sheet.width), label
    assert contact_sheet(["a"], [("b", [white])], cell).height == 34 + 112 + 12, "one line takes no more than before"


def test_labels_are_drawn_in_letters_that_a_font_has(monkeypatch: pytest.MonkeyPatch) -> None:
    white = Image.new("RGB", (160, 160), "white")

    def drawn(label: str) -> bytes:
        return contact_sheet([label], [("", [white])], 160).tobytes()

    own = drawn("fox")
    if any(sheets._loaded(name, 15) for name in sheets._SYSTEM_FONTS):
        assert drawn("狐狸") not in (drawn("\\u72d0\\u72f8"), drawn("猫狗"))
        assert drawn("fox") == own, "which needs no other font"
    monkeypatch.setattr(sheets, "_SYSTEM_FONTS", ())
    assert drawn("狐狸") == drawn("\\u72d0\\u72f8") != drawn("猫狗")


def test_a_strip_has_every_frame() -> None:
    colours = ["red", "green", "blue"]
    shown = strip([Image.new("RGB", (32, 16), colour) for colour in colours], 8)
    assert shown.size == (3 * 16 + 2 * 4, 8)
    assert [shown.getpixel((20 * i + 8, 4)) for i in range(3)] == [
        Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours
    ]
