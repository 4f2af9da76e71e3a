"""Every annotator keeps its promises; learned ones run on tiny random models saved to disk and loaded for real."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from mahlstick import annotators
from mahlstick.annotators import geometry, weights
from mahlstick.errors import MahlstickError

WEIGHTLESS = [name for name in annotators.names() if annotators.get(name).needs == "nothing" and name != "inpaint"]
LEARNED = ["softedge", "lineart_realistic", "mlsd", "depth", "normal", "pose", "segmentation"]


def photo(name: str = "astronaut", width: int = 192, height: int = 192) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((width, height))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def binary(picture: Image.Image) -> bool:
    return set(np.unique(pixels(picture))) <= {0, 255}


# --- the registry


def test_the_list() -> None:
    wanted = {
        "canny", "softedge", "lineart", "scribble", "mlsd", "depth", "normal", "pose", "segmentation", "tile",
        "shuffle", "color", "grey", "mask", "inpaint",
    }  # fmt: skip
    assert wanted <= set(annotators.names())
    assert {name for name in annotators.names() if annotators.get(name).weights} == set(LEARNED)
    for name in annotators.names():
        annotator = annotators.get(name)
        assert annotator.name == name and annotator.description.endswith(".")
        assert annotator.needs == "nothing" or annotator.options["model"].default in annotator.needs
    for alias, name in annotators.ALIASES.items():
        assert annotators.get(alias).name == name


def test_import_is_free() -> None:
    code = (
        "import sys; from mahlstick import annotators; annotators.get('canny').options;"
        "print([m for m in ('torch', 'cv2', 'skimage', 'scipy', 'controlnet_aux', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_are_read_from_the_signature() -> None:
    options = annotators.get("canny").options
    assert list(options) == ["low", "high"]
    assert (options["low"].type, options["low"].default, options["low"].range) == (int, 100, annotators.Range(0, 2040))
    assert annotators.get("mask").options["method"].choices == ("auto", "alpha", "threshold", "subject")
    assert annotators.get("grey").options == {}
    for name in annotators.names():
        for option in annotators.get(name).options.values():
            assert option.read(option.default) == option.default


def test_words_from_a_command_line_are_read() -> None:
    picture = photo()
    words = annotators.annotate("canny", picture, low="50", high="150.0")
    assert pixels(words).tobytes() == pixels(annotators.annotate("canny", picture, low=50, high=150)).tobytes()
    subject = annotators.annotate("mask", picture, method="threshold")
    inverse = annotators.annotate("mask", picture, method="threshold", invert="yes")
    assert pixels(ImageOps.invert(subject)).tobytes() == pixels(inverse).tobytes()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cany", {}, "did you mean canny"),
        ("nothing like it", {}, "did you mean"),
        ("canny", {"lo": 3}, "'canny' has no option 'lo'; it takes low, high"),
        ("grey", {"lo": 3}, "takes no options"),
        ("canny", {"low": -1}, "low is -1; give a whole number from 0 to 2040"),
        ("canny", {"low": 2.5}, "low is 2.5; give a whole number"),
        ("canny", {"low": True}, "low is True"),
        ("canny", {"low": "many"}, "low is 'many'"),
        ("canny", {"low": None}, "low is None"),
        ("canny", {"low": 300}, "low must not exceed high"),
        ("tile", {"factor": float("nan")}, "factor is nan; give a number from 1 to 64"),
        ("tile", {"factor": "inf"}, "factor is 'inf'"),
        ("lineart", {"source": "photo"}, "give one of auto, picture, drawing"),
        ("mask", {"invert": "perhaps"}, "give true or false"),
        ("mask", {"method": "alpha"}, "no transparency"),
        ("inpaint", {}, "give mask="),
        ("inpaint", {"mask": "none.png"}, "'none.png' does not exist"),
        ("shuffle", {"seed": 2**40}, "seed is"),
    ],
)
def test_bad_requests(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(MahlstickError) as caught:
        annotators.annotate(name, noise(16, 16), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(MahlstickError, match=r"'canny'.*none\.png.*does not exist"):
        annotators.annotate("canny", tmp_path / "none.png")


def test_the_documentation_lists_what_there_is() -> None:
    script = Path(__file__).parents[1] / "docs" / "annotators.py"
    spec = importlib.util.spec_from_file_location("docs_annotators", script)
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    text = docs.PAGE.read_text(encoding="utf-8")
    assert docs.page(text) == text, "run python docs/annotators.py"


# --- all that need no weights


@pytest.mark.parametrize("name", WEIGHTLESS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 513), (513, 7), (3000, 1), (40000, 2), (65, 63)])
def test_the_size_is_kept(name: str, size: tuple[int, int]) -> None:
    for source in (noise(*size), Image.new("RGB", size, (90, 90, 90))):
        result = annotators.annotate(name, source)
        assert result.mode == "RGB" and result.size == size


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_same_picture_same_result_and_the_source_is_untouched(name: str) -> None:
    source = photo("coffee", 120, 90)
    before = source.tobytes()
    first = annotators.annotate(name, source)
    np.random.seed(1)
    torch.manual_seed(1)
    assert annotators.annotate(name, pixels(source)).tobytes() == first.tobytes()
    assert source.tobytes() == before
    assert first.tobytes() != before


@pytest.mark.parametrize("name", ["canny", "scribble", "mask"])
def test_black_and_white_where_promised(name: str) -> None:
    for source in (photo(), noise(50, 40), photo("coffee", 100, 60)):
        assert binary(annotators.annotate(name, source))


# --- edges


def test_canny_is_opencv_and_controlnet_aux() -> None:
    import cv2

    with weights._quiet():
        from controlnet_aux import CannyDetector
    for low, high in ((100, 200), (20, 60), (0, 0)):
        picture = photo("astronaut", 192, 128)
        ours = pixels(annotators.annotate("canny", picture, low=low, high=high))
        assert np.array_equal(ours[:, :, 1], cv2.Canny(pixels(picture), low, high))
        theirs = CannyDetector()(picture, low, high, detect_resolution=128, image_resolution=128)
        assert np.array_equal(ours, theirs)


def test_canny_thresholds_are_monotone() -> None:
    picture = photo()
    previous = None
    for high in (100, 200, 400, 800):
        edges = pixels(annotators.annotate("canny", picture, low=50, high=high)) > 0
        assert previous is None or not (edges & ~previous).any()
        previous = edges
    assert 0 < previous.sum() < (pixels(annotators.annotate("canny", picture)) > 0).sum()


def disc() -> Image.Image:
    picture = Image.new("RGB", (128, 128), (230, 200, 60))
    ImageDraw.Draw(picture).ellipse((24, 24, 103, 103), fill=(60, 20, 20))
    return picture


@pytest.mark.parametrize("name", ["lineart", "scribble"])
def test_lines_lie_on_the_outline(name: str) -> None:
    lines = pixels(annotators.annotate(name, disc()))[:, :, 0]
    y, x = np.mgrid[:128, :128]
    distance = np.abs(np.hypot(x - 63.5, y - 63.5) - 40)
    assert lines[distance > 4].max() == 0
    angle = np.round(np.arctan2(y - 63.5, x - 63.5) * 10).astype(int)
    for sector in np.unique(angle):  # closed all around
        assert lines[(angle == sector) & (distance < 4)].max() > 127


@pytest.mark.parametrize("name", ["lineart", "scribble"])
@pytest.mark.parametrize("paper", ["white", "black"])
def test_a_drawing_keeps_its_lines_white_on_black(name: str, paper: str) -> None:
    ink = "black" if paper == "white" else "white"
    drawing = Image.new("RGB", (128, 128), paper)
    draw = ImageDraw.Draw(drawing)
    draw.ellipse((20, 20, 100, 100), outline=ink, width=2)
    draw.line((10, 120, 120, 90), fill=ink, width=3)
    expected = pixels(drawing if paper == "black" else ImageOps.invert(drawing))
    options = {"thickness": 0.1} if name == "scribble" else {}
    assert np.array_equal(pixels(annotators.annotate(name, drawing, **options)), expected)
    traced = pixels(annotators.annotate(name, drawing, source="picture"))
    assert not np.array_equal(traced, expected)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "horse", "page"])
def test_photographs_are_no_drawings_but_their_lines_are(name: str) -> None:
    import skimage.data

    array = getattr(skimage.data, name)()
    picture = Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array).convert("RGB")
    found = annotators.annotate("lineart", picture)
    assert found.tobytes() == annotators.annotate("lineart", picture, source="picture").tobytes()
    for drawing in (found, ImageOps.invert(found)):
        again = annotators.annotate("lineart", drawing)
        assert again.tobytes() == annotators.annotate("lineart", drawing, source="drawing").tobytes()


def test_lineart_is_thin_light_lines_and_a_flat_picture_has_none() -> None:
    lines = pixels(annotators.annotate("lineart", photo("astronaut", 512, 512)))
    assert np.median(lines) == 0 and lines.max() == 255
    assert 0.01 < (lines > 127).mean() < 0.15
    faint = np.full((64, 64, 3), 128, np.uint8)
    faint[::2, ::2] += 2
    assert pixels(annotators.annotate("lineart", faint)).max() < 64
    weak = [pixels(annotators.annotate("lineart", photo(), threshold=t)).astype(int).sum() for t in (0, 0.3, 0.6)]
    assert weak[0] > weak[1] > weak[2] > 0


def test_scribble_thickness() -> None:
    thin, thick = (pixels(annotators.annotate("scribble", disc(), thickness=t))[:, :, 0] for t in (0.8, 6))
    assert (thick >= thin).all() and (thick > 0).sum() > 4 * (thin > 0).sum()


# --- colours


def test_color_is_the_exact_mean_of_each_cell() -> None:
    source = pixels(photo("coffee", 100, 60)).astype(float)
    result = pixels(annotators.annotate("color", source / 255, cells=6))
    for row in range(6):
        for column in range(10):
            cell = np.s_[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
            mean = source[cell].reshape(-1, 3).mean(0)
            assert (np.abs(result[cell].reshape(-1, 3) - mean) <= 0.5 + 1e-9).all()
    uneven = pixels(annotators.annotate("color", noise(13, 7), cells=3))
    assert len(np.unique(uneven.reshape(-1, 3), axis=0)) <= 3 * 6
    assert annotators.annotate("color", noise(8, 8), cells=8).tobytes() == noise(8, 8).tobytes()


def test_shuffle_moves_colours_and_makes_none() -> None:
    source = photo("coffee", 256, 192)
    result = annotators.annotate("shuffle", source, seed=3)
    assert result.tobytes() == annotators.annotate("shuffle", source, seed=3).tobytes()
    assert result.tobytes() != annotators.annotate("shuffle", source, seed=4).tobytes()
    flat = Image.new("RGB", (64, 64), (12, 34, 56))
    assert annotators.annotate("shuffle", flat).tobytes() == flat.tobytes()
    assert (pixels(result).min((0, 1)) >= pixels(source).min((0, 1))).all()
    assert (pixels(result).max((0, 1)) <= pixels(source).max((0, 1))).all()
    two = Image.new("RGB", (200, 200), "red")
    two.paste("blue", (0, 0, 100, 200))
    shares = [(pixels(annotators.annotate("shuffle", two, seed=s))[:, :, 0] > 127).mean() for s in range(12)]
    assert abs(np.mean(shares) - 0.5) < 0.15, "on average every part of the picture is drawn from alike"


def test_tile_keeps_the_coarse_and_drops_the_fine() -> None:
    source = photo("astronaut", 256, 256)
    result = annotators.annotate("tile", source, factor=8)
    coarse = [pixels(p.resize((16, 16), Image.Resampling.BOX)).astype(int) for p in (source, result)]
    assert np.abs(coarse[0] - coarse[1]).mean() < 6
    detail = [np.abs(np.diff(pixels(p).astype(int), axis=1)).mean() for p in (source, result)]
    assert detail[1] < 0.6 * detail[0]
    assert annotators.annotate("tile", source, factor=1).tobytes() == source.tobytes()


def test_grey() -> None:
    result = pixels(annotators.annotate("grey", photo()))
    assert (result == result[:, :, :1]).all()
    assert np.abs(result[:, :, 0] - pixels(photo()) @ [0.299, 0.587, 0.114]).max() <= 1


# --- areas


def test_mask_methods() -> None:
    inside = np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 39
    for method in ("auto", "threshold", "subject"):
        found = pixels(annotators.annotate("mask", disc(), method=method))[:, :, 0] > 127
        overlap = (found & inside).sum() / (found | inside).sum()
        assert overlap > 0.9, (method, overlap)
    transparent = disc()
    transparent.putalpha(Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))))
    for method in ("auto", "alpha"):
        found = pixels(annotators.annotate("mask", transparent, method=method))
        assert np.array_equal(found[5, :, 0], np.arange(128))


def test_inpaint_condition() -> None:
    source = photo("coffee", 64, 48)
    mask = Image.new("L", (32, 24))
    mask.paste(255, (0, 0, 16, 24))
    condition = annotators.inpaint_condition(source, mask)
    assert condition.shape == (1, 3, 48, 64) and condition.dtype == torch.float32
    assert (condition[..., :31] == -1).all()
    assert np.allclose(condition[0, :, :, 33:].permute(1, 2, 0).numpy() * 255, pixels(source)[:, 33:], atol=1e-3)
    preview = pixels(annotators.annotate("inpaint", source, mask=mask))
    repainted = (condition[0] == -1).all(0).numpy()
    assert (preview[repainted] == 0).all() and np.array_equal(preview[~repainted], pixels(source)[~repainted])

    cut = source.copy()
    cut.putalpha(ImageOps.invert(mask.resize(source.size, Image.Resampling.NEAREST)))
    hole = annotators.inpaint_condition(cut)
    assert ((hole == -1).all(1)[0].numpy() == (pixels(cut)[:, :, 3] == 0)).all()
    assert pixels(annotators.annotate("inpaint", cut))[:, :32].max() == 0
    with pytest.raises(MahlstickError, match="give mask="):
        annotators.inpaint_condition(source)


# --- learned: what they say without weights


@pytest.mark.parametrize("name", LEARNED)
def test_a_folder_without_weights_is_one_sentence(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "pose":
        pytest.importorskip("rtmlib", reason="an extra: mahlstick[pose]")
    with pytest.raises(MahlstickError) as caught:
        annotators.annotate(name, noise(32, 32), model=str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message and "give model=" in message and "\n" not in message
    assert capfd.readouterr().out == ""


def test_pose_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rtmlib", None)  # as where it is not installed
    with pytest.raises(MahlstickError, match=r"pose needs rtmlib; install mahlstick\[pose\]$"):
        annotators.annotate("pose", noise(32, 32))


def test_without_the_hub_the_answer_comes_at_once() -> None:
    names = ["softedge", "depth", "segmentation"]  # controlnet-aux, and transformers twice
    code = (
        "from mahlstick import annotators; from mahlstick.errors import MahlstickError\n"
        f"for name in {names}:\n"
        "    try: annotators.annotate(name, __import__('numpy').zeros((32, 32, 3), 'uint8'), model='nobody/nothing')\n"
        "    except MahlstickError as error: print(error)"
    )
    closed = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=closed, timeout=120, check=True)
    answers = done.stdout.splitlines()
    assert len(answers) == len(names)
    for name, answer in zip(names, answers, strict=True):
        assert repr(name) in answer and "'nobody/nothing'" in answer and "the hub does not answer" in answer
    assert "Retry" not in done.stderr and "Traceback" not in done.stderr


def test_wrong_weights_are_one_sentence(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "ControlNetHED.pth")
    with pytest.raises(MahlstickError, match=r"ControlNetHED\.pth cannot be loaded"):
        annotators.annotate("softedge", noise(32, 32), model=str(tmp_path))


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch malicious-was-run",)


def test_a_malicious_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"norm": _Malicious()}, tmp_path / "ControlNetHED.pth")
    with pytest.raises(MahlstickError, match=r"ControlNetHED\.pth"):
        annotators.annotate("softedge", noise(32, 32), model=str(tmp_path))
    assert not (tmp_path / "malicious-was-run").exists()


# --- learned: tiny random models, saved and loaded as real ones are


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with random weights of the controlnet-aux detectors, under their published names."""
    with weights._quiet():
        from controlnet_aux.hed import ControlNetHED_Apache2
        from controlnet_aux.lineart import Generator
        from controlnet_aux.mlsd.models.mbv2_mlsd_large import MobileV2_MLSD_Large
    folder = tmp_path_factory.mktemp("classic")
    torch.manual_seed(0)
    torch.save(ControlNetHED_Apache2().state_dict(), folder / "ControlNetHED.pth")
    torch.save(MobileV2_MLSD_Large().state_dict(), folder / "mlsd_large_512_fp32.pth")
    for name in ("sk_model.pth", "sk_model2.pth"):
        torch.save(Generator(3, 1, 3).state_dict(), folder / name)
    return str(folder)


@pytest.mark.parametrize("name", ["softedge", "lineart_realistic", "mlsd"])
@pytest.mark.parametrize("size", [(1, 1), (7, 513), (97, 65)])
def test_controlnet_aux_detectors(name: str, size: tuple[int, int], classic: str) -> None:
    result = annotators.annotate(name, noise(*size), model=classic, resolution=64)
    assert result.mode == "RGB" and result.size == size
    assert result.tobytes() == annotators.annotate(name, noise(*size), model=classic, resolution=64).tobytes()


def test_softedge_is_controlnet_aux_at_its_own_size(classic: str) -> None:
    with weights._quiet():
        from controlnet_aux import HEDdetector
    picture = photo("coffee", 192, 128)
    reference = HEDdetector.from_pretrained(classic)(picture, detect_resolution=128, image_resolution=128)
    ours = annotators.annotate("softedge", picture, model=classic, resolution=128)
    assert np.array_equal(ours, reference.convert("RGB"))
    assert pixels(ours).std() > 0


def test_detectors_are_kept(classic: str) -> None:
    assert weights.detector("HEDdetector", classic) is weights.detector("HEDdetector", classic)


@pytest.mark.parametrize("size", [(1, 1), (512, 512), (640, 480), (513, 7), (1, 100_000)])
def test_working_size(size: tuple[int, int]) -> None:
    width, height = weights.working_size(size, 512)
    assert width % 64 == height % 64 == 0 and min(width, height) == 512
    assert max(width, height) <= 4 * 512
    if max(size) < 4 * min(size):
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.1


@pytest.fixture(scope="module", params=["depth_anything", "dpt"])
def depth_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    import transformers as t

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "depth_anything":
        backbone = t.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
            out_features=["stage1", "stage2"], reshape_hidden_states=False, apply_layernorm=True,
        )  # fmt: skip
        config = t.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, patch_size=14, reassemble_factors=[2, 1],
            neck_hidden_sizes=[16, 16], fusion_hidden_size=16, head_hidden_size=8,
        )  # fmt: skip
        network = t.DepthAnythingForDepthEstimation(config)
    else:
        config = t.DPTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64,
            patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        )  # fmt: skip
        network = t.DPTForDepthEstimation(config)
    network.save_pretrained(folder)
    size = {"height": 56, "width": 56} if request.param == "depth_anything" else {"height": 64, "width": 64}
    t.DPTImageProcessor(size=size).save_pretrained(folder)
    return str(folder)


def test_depth(depth_model: str) -> None:
    for picture in (photo("coffee", 90, 61), noise(1, 1), noise(7, 513)):
        near = annotators.annotate("depth", picture, model=depth_model)
        far = annotators.annotate("depth", picture, model=depth_model, invert=True)
        assert near.size == far.size == picture.size and near.mode == "RGB"
        assert np.abs(pixels(near).astype(int) + pixels(far) - 255).max() <= 1
    levels = pixels(annotators.annotate("depth", photo("coffee", 90, 61), model=depth_model))
    assert levels.min() == 0 and levels.max() == 255 and (levels == levels[:, :, :1]).all()


def test_depth_is_the_models_own(depth_model: str) -> None:
    import transformers

    picture = photo("coffee", 90, 61)
    estimate = transformers.pipeline("depth-estimation", model=depth_model, device="cpu")
    predicted = estimate(picture)["predicted_depth"].numpy()
    unit = (predicted - predicted.min()) / np.ptp(predicted)
    ours = pixels(annotators.annotate("depth", picture, model=depth_model))[:, :, 0]
    assert np.abs(ours / 255 - unit).max() <= 0.5 / 255 + 1e-6


def test_normal_follows_depth(depth_model: str) -> None:
    picture = photo("coffee", 90, 61)
    direct = annotators.annotate("normal", picture, model=depth_model)
    assert direct.size == picture.size
    near = annotators.annotate("depth", picture, model=depth_model)
    through = annotators.annotate("normal", near, source="depth", smooth=3)
    smooth = annotators.annotate("normal", picture, model=depth_model, smooth=3)
    assert np.abs(pixels(through).astype(int) - pixels(smooth)).mean() < 3


def test_normals_of_a_ball() -> None:
    y, x = np.mgrid[-60:61, -60:61].astype(float)
    height = np.sqrt(np.maximum(50**2 - x**2 - y**2, 0))
    inside = np.hypot(x, y) < 45
    true = np.stack([-x, -y, height], axis=2) / 50
    error = np.degrees(np.arccos((geometry.normals(height) * true).sum(2).clip(-1, 1)))[inside]
    assert error.max() < 2
    depth = Image.fromarray(np.rint(height / 50 * 255).astype(np.uint8))
    colours = pixels(annotators.annotate("normal", depth, source="depth", strength=50 / 121, smooth=1)).astype(int)
    centre = colours[60, 60]
    assert np.abs(centre - [128, 128, 255]).max() <= 2, "flat faces the viewer: blue"
    assert colours[60, 25, 0] > 190 > 60 > colours[60, 95, 0], "left is red"
    assert colours[25, 60, 1] > 190 > 60 > colours[95, 60, 1], "top is green"
    length = np.linalg.norm(colours / 127.5 - 1, axis=2)
    assert np.abs(length - 1).max() < 0.02


@pytest.fixture(scope="module", params=["semantic", "universal"])
def segmentation_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    import transformers as t

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "semantic":
        config = t.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[8, 16], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=7,
        )  # fmt: skip
        t.SegformerForSemanticSegmentation(config).save_pretrained(folder)
        t.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
        return str(folder)
    backbone = t.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.Mask2FormerConfig(
        backbone_config=backbone, num_queries=9, num_labels=7, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16,
    )  # fmt: skip
    t.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    t.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_segmentation(segmentation_model: str) -> None:
    palette = {tuple(colour) for colour in weights.ade_palette()[:7]}
    for picture in (photo("coffee", 90, 61), noise(1, 1), noise(7, 129)):
        result = annotators.annotate("segmentation", picture, model=segmentation_model)
        assert result.mode == "RGB" and result.size == picture.size
        assert {tuple(colour) for colour in pixels(result).reshape(-1, 3).tolist()} <= palette


def test_segmentation_is_the_models_own_classes(segmentation_model: str) -> None:
    picture = photo("coffee", 90, 61)
    processor, network = weights.segmenter(segmentation_model)
    with torch.no_grad():
        outputs = network(**processor(images=picture, return_tensors="pt"))
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[(61, 90)])[0].numpy()
    result = pixels(annotators.annotate("segmentation", picture, model=segmentation_model))
    for number in np.unique(classes):
        assert (result[classes == number] == weights.ade_palette()[number]).all()


# --- pose: real ONNX files, run by onnxruntime, that find the same person in every picture


def field(number: int, value: int | bytes | str) -> bytes:
    """One protobuf field."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def constant_onnx(path: Path, input_shape: tuple[int, ...], outputs: dict[str, np.ndarray]) -> None:
    """An ONNX network that answers every input of that shape with the same arrays."""

    def declared(name: str, shape: tuple[int, ...]) -> bytes:
        dims = b"".join(field(1, field(1, side)) for side in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    graph = field(2, "constant") + field(11, declared("input", input_shape))
    for name, array in outputs.items():
        tensor = b"".join(field(1, side) for side in array.shape) + field(2, 1) + field(8, f"{name}_value")
        graph += field(1, field(1, f"{name}_value") + field(2, name) + field(4, "Identity"))
        graph += field(5, tensor + field(9, array.astype("<f4").tobytes())) + field(12, declared(name, array.shape))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))


def pose_folder(folder: Path, score: float) -> str:
    pytest.importorskip("rtmlib", reason="an extra: mahlstick[pose]")
    constant_onnx(folder / "detector.onnx", (1, 3, 64, 64), {"boxes": np.array([[[8, 8, 56, 56, score]]])})
    columns, rows = np.zeros((1, 133, 96)), np.zeros((1, 133, 128))  # twice the input's 48 x 64
    joints = np.arange(133)
    columns[0, joints, 24 + joints * 7 % 48] = rows[0, joints, 20 + joints * 5 % 88] = 0.9
    constant_onnx(folder / "pose.onnx", (1, 3, 64, 48), {"simcc_x": columns, "simcc_y": rows})
    return str(folder)


def test_pose(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = pose_folder(tmp_path, score=0.9)
    whole = annotators.annotate("pose", noise(128, 96), model=model)
    body = annotators.annotate("pose", noise(128, 96), model=model, parts="body")
    assert whole.size == body.size == (128, 96) and whole.mode == "RGB"
    assert 0 < (pixels(body) > 0).sum() < (pixels(whole) > 0).sum()
    assert pixels(annotators.annotate("pose", noise(128, 96), model=model, threshold=5)).max() == 0
    assert "load" not in capfd.readouterr().out


def test_pose_draws_the_nose_where_the_network_saw_it(tmp_path: Path) -> None:
    model = pose_folder(tmp_path, score=0.9)
    people, points = weights.pose_estimator(model)
    assert people.model_input_size == (64, 64) and points.model_input_size == (48, 64)
    frame = np.zeros((96, 128, 3), np.uint8)
    keypoints, scores = points(frame, bboxes=people(frame))
    x, y = keypoints[0, 0].round().astype(int)
    assert keypoints.shape == (1, 134, 2) and 0 < x < 128 and 0 < y < 96 and scores[0, 0] > 0.5
    drawn = pixels(annotators.annotate("pose", frame, model=model, parts="body"))
    assert drawn[y, x].max() > 50


def test_no_person_no_pose(tmp_path: Path) -> None:
    assert pixels(annotators.annotate("pose", noise(128, 96), model=pose_folder(tmp_path, score=0.01))).max() == 0
