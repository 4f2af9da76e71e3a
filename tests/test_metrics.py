"""Measures against numbers worked out by hand, their algebra, and encoders saved and loaded as real ones are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from benchmarks import tiny
from mahlstick import annotators
from mahlstick.errors import MahlstickError
from mahlstick.training import metrics
from tests.test_annotators import photo, pose_folder

WITHOUT_MEASURE = {"shuffle", "inpaint"}
WEIGHTLESS = {
    "canny": "edge_f1",
    "lineart": "edge_f1",
    "scribble": "edge_f1",
    "tile": "rmse",
    "color": "rmse",
    "grey": "rmse",
    "mask": "mask_iou",
}

quickly = settings(max_examples=40, deadline=None)
maps = hnp.arrays(np.bool_, (9, 7))
depths = hnp.arrays(np.float64, (4, 5), elements=st.floats(0, 1, width=16))


def vertical(*columns: int, size: int = 16) -> np.ndarray:
    """A map with vertical lines."""
    drawn = np.zeros((size, size), np.uint8)
    drawn[:, list(columns)] = 255
    return drawn


# ---- edges


@pytest.mark.parametrize(
    ("found", "tolerance", "f1"),
    [
        (vertical(8), 0, 1),
        (vertical(9), 0, 0),
        (vertical(9), 1, 1),
        (vertical(10), 1, 0),
        (vertical(10), 2, 1),
        (vertical(8, 12), 0, 2 / 3),  # precision 1/2, recall 1
        (vertical(8, 12), 1, 2 / 3),
        (vertical(), 1, 0),
    ],
)
def test_edge_f1(found: np.ndarray, tolerance: int, f1: float) -> None:
    for wanted, seen in ((vertical(8), found), (vertical(8) > 0, found / 255.0), (torch.tensor(vertical(8)), found)):
        assert metrics.edge_f1(wanted, seen, tolerance) == pytest.approx(f1)
        assert metrics.edge_f1(seen, wanted, tolerance) == pytest.approx(f1)


def test_edge_f1_of_two_empty_maps_is_agreement_and_the_split_is_at_half_white() -> None:
    assert metrics.edge_f1(vertical(), vertical()) == 1
    assert metrics.edge_f1(vertical(8), vertical(8) // 2 + 1) == 1
    assert metrics.edge_f1(vertical(8), vertical(8) // 2) == 0


def test_edge_f1_weighs_precision_and_recall_by_their_own_pixels() -> None:
    wanted, found = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    wanted[2, :6] = True
    found[2, 3:7] = True  # 3 of 4 right, 3 of 6 found
    assert metrics.edge_f1(wanted, found, tolerance=0) == pytest.approx(2 * 0.75 * 0.5 / 1.25)


@quickly
@given(maps, maps, st.integers(0, 3))
def test_edge_f1_is_symmetric_in_range_and_grows_with_tolerance(a: np.ndarray, b: np.ndarray, tolerance: int) -> None:
    f1 = metrics.edge_f1(a, b, tolerance)
    assert 0 <= f1 <= 1 and f1 == pytest.approx(metrics.edge_f1(b, a, tolerance))
    assert metrics.edge_f1(a, b, tolerance + 1) >= f1 - 1e-12
    assert metrics.edge_f1(a, a, tolerance) == pytest.approx(1)


# ---- areas


def test_mask_iou() -> None:
    wanted, found = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    wanted[:, :4], found[:, 2:6] = 255, 255
    assert metrics.mask_iou(wanted, found) == pytest.approx(16 / 48)
    assert metrics.mask_iou(wanted, 255 - wanted) == 0
    assert metrics.mask_iou(wanted * 0, found * 0) == 1 and metrics.mask_iou(wanted * 0, found) == 0
    faint = found / 255 * 0.4
    assert metrics.mask_iou(wanted, faint) == 0
    assert metrics.mask_iou(found, faint, threshold=0.3) == 1


@quickly
@given(maps, maps)
def test_mask_iou_is_symmetric_and_in_range(a: np.ndarray, b: np.ndarray) -> None:
    assert 0 <= metrics.mask_iou(a, b) == metrics.mask_iou(b, a) <= 1
    assert metrics.mask_iou(a, a) == 1
    assert (metrics.mask_iou(a, b) == 1) == bool((a == b).all())


def test_mean_iou_is_over_the_labels_that_either_has() -> None:
    wanted = np.array([[1, 1, 1, 1], [900, 900, 900, 900]])
    found = np.array([[1, 1, 1, 7], [900, 900, 7, 7]])
    assert metrics.mean_iou(wanted, found) == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert metrics.mean_iou(wanted, wanted) == 1


def test_areas_of_a_segmentation_differ_by_any_channel() -> None:
    colours = np.array([[[1, 2, 3], [1, 2, 4], [1, 5, 3], [6, 2, 3]]], np.uint8)
    assert metrics._of_colours(colours, colours) == 1
    for other in range(1, 4):
        assert metrics._of_colours(colours[:, :1], colours[:, other : other + 1]) == 0


@quickly
@given(maps, maps)
def test_mean_iou_of_two_labels_is_the_mean_of_both_masks(a: np.ndarray, b: np.ndarray) -> None:
    both = [metrics.mask_iou(a == label, b == label) for label in (False, True) if ((a == label) | (b == label)).any()]
    assert metrics.mean_iou(a, b) == pytest.approx(np.mean(both))


def test_skeleton_iou() -> None:
    def arm(column: int, level: int = 255) -> np.ndarray:
        drawn = np.zeros((20, 40, 3), np.uint8)
        drawn[:, column, 2] = level
        return drawn

    assert metrics.skeleton_iou(arm(20), arm(20)) == 1
    assert metrics.skeleton_iou(arm(20), arm(21)) == pytest.approx(6 / 8)  # two bands 7 pixels wide
    assert metrics.skeleton_iou(arm(20), arm(21), reach=0) == 0
    assert metrics.skeleton_iou(arm(20), arm(20, level=20)) == 0, "traces of compression are no limb"


# ---- depth, normals, colours


def test_rmse() -> None:
    assert metrics.rmse([[0.0, 0.0]], [[0.3, 0.4]]) == pytest.approx(math.sqrt(0.25 / 2))
    white, black = np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8)
    assert metrics.rmse(white, black) == 1


def test_depth_is_relative() -> None:
    ramp = np.linspace(0, 1, 50).reshape(5, 10)
    assert metrics.depth_rmse(ramp, 0.3 * ramp + 0.2) == pytest.approx(0, abs=1e-12)
    assert metrics.depth_rmse(ramp, 1 - ramp) == pytest.approx(ramp.std()), "inside out is no match"
    assert metrics.depth_rmse(ramp, np.full_like(ramp, 0.1)) == pytest.approx(ramp.std())
    assert metrics.depth_rmse(np.full_like(ramp, 0.1), ramp) == pytest.approx(0, abs=1e-12)


def test_psnr() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    a, b = (np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8) for seed in (0, 1))
    assert metrics.psnr(a, b) == pytest.approx(skimage.peak_signal_noise_ratio(a, b))
    assert metrics.psnr(a, a) == 100


def test_depth_rmse_is_the_residual_of_the_regression_line() -> None:
    wanted, found = np.random.default_rng(0).random((2, 6, 6))
    wanted = 0.5 * wanted + 0.5 * found
    design = np.stack([found.ravel(), np.ones(36)], axis=1)
    _, (squared,), *_ = np.linalg.lstsq(design, wanted.ravel())
    assert metrics.depth_rmse(wanted, found) == pytest.approx(math.sqrt(squared / 36))


@quickly
@given(depths, depths, st.floats(0.1, 10), st.floats(-1, 1))
def test_depth_rmse_ignores_scale_and_shift(a: np.ndarray, b: np.ndarray, scale: float, shift: float) -> None:
    error = metrics.depth_rmse(a, b)
    assert 0 <= error <= a.std() + 1e-12
    if np.ptp(b) > 1e-3:
        assert metrics.depth_rmse(a, scale * b + shift) == pytest.approx(error, abs=1e-6)


def test_normal_angle() -> None:
    up, right = np.zeros((3, 3, 3)), np.zeros((3, 3, 3))
    up[..., 1], right[..., 0] = 5, 0.1
    assert metrics.normal_angle(up, up) == 0
    assert metrics.normal_angle(up, right) == pytest.approx(90)
    assert metrics.normal_angle(up, -up) == pytest.approx(180)
    assert metrics.normal_angle(up, up + 50 * right) == pytest.approx(45)
    tilted = up.copy()
    tilted[0] = right[0]
    assert metrics.normal_angle(up, tilted) == pytest.approx(30), "the mean over the pixels"


# ---- pose


def person() -> np.ndarray:
    points = np.random.default_rng(1).uniform(0, 200, (17, 3))
    points[:, 2] = 2
    return points


def test_the_sigmas_are_coco_s() -> None:
    thousandths = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    assert metrics.COCO_SIGMAS == pytest.approx(np.array(thousandths) / 1000)


def test_oks_of_a_known_offset() -> None:
    wanted = person()
    assert metrics.pose_oks(wanted, wanted, area=900) == 1
    moved = wanted.copy()
    moved[:, 0] += 3
    moved[:, 1] += 4
    by_hand = np.mean([math.exp(-25 / (2 * 900 * (2 * sigma) ** 2)) for sigma in metrics.COCO_SIGMAS])
    assert metrics.pose_oks(wanted, moved, area=900) == pytest.approx(by_hand)
    nose = wanted.copy()
    nose[0, 0] += 30 * 2 * 0.026  # one of COCO's standard deviations, 2σ √area
    assert metrics.pose_oks(wanted, nose, area=900) == pytest.approx((16 + math.exp(-1 / 2)) / 17)
    ankle = wanted.copy()
    ankle[16, 1] -= 30 * 2 * 0.089
    assert metrics.pose_oks(wanted, ankle, area=900) == pytest.approx((16 + math.exp(-1 / 2)) / 17)


def test_oks_counts_what_is_visible() -> None:
    wanted, found = person(), person()
    wanted[:5, 2] = 0
    found[:5] = np.nan  # not asked for
    found[5, 2] = 0  # asked for and not found, at the right place by chance
    assert metrics.pose_oks(wanted, found, area=900) == pytest.approx(11 / 12)
    wanted[:, 2] = 0
    with pytest.raises(MahlstickError, match="no keypoint"):
        metrics.pose_oks(wanted, found, area=900)


def test_oks_of_other_keypoints_and_bad_requests() -> None:
    four = np.ones((4, 3))
    assert metrics.pose_oks(four, four, area=1, sigmas=[0.1] * 4) == 1
    with pytest.raises(MahlstickError, match="sigmas"):
        metrics.pose_oks(four, four, area=1)
    with pytest.raises(MahlstickError, match="area is 0"):
        metrics.pose_oks(four, four, area=0, sigmas=[0.1] * 4)


@quickly
@given(st.floats(0, 50), st.floats(0, 50), st.floats(100, 1e5))
def test_oks_falls_with_distance(near: float, further: float, area: float) -> None:
    wanted, close, far = person(), person(), person()
    close[:, 0] += near
    far[:, 0] += near + further
    assert 0 <= metrics.pose_oks(wanted, far, area) <= metrics.pose_oks(wanted, close, area) <= 1


# ---- the condition, found again


def is_better(name: str, value: float, than: float) -> bool:
    return value > than if metrics.higher_is_better(name) else value < than


def check(annotator: str, own: Image.Image, other: Image.Image, measure: str, **options: object) -> None:
    """Perfect against its own control, worse against another picture's."""
    control = annotators.annotate(annotator, own, **options)
    name, value = metrics.condition_error(annotator, control, own, **options)
    perfect = 1 if metrics.higher_is_better(name) else 0
    assert name == measure and value == pytest.approx(perfect, abs=1e-6)
    _, worse = metrics.condition_error(annotator, control, other, **options)
    assert is_better(name, value, worse) and abs(value - worse) > 0.05


@pytest.mark.parametrize(("annotator", "measure"), WEIGHTLESS.items())
def test_condition_error_without_weights(annotator: str, measure: str) -> None:
    check(annotator, photo("astronaut", 96, 80), photo("coffee", 96, 80), measure)


def test_every_annotator_without_weights_was_tried() -> None:
    weightless = {name for name in annotators.names() if not annotators.get(name).weights}
    assert weightless == WEIGHTLESS.keys() | WITHOUT_MEASURE


def test_condition_error_of_normals() -> None:
    check("normal", photo("astronaut", 96, 80), photo("coffee", 96, 80), "normal_angle", source="depth")


def test_condition_error_passes_options_and_takes_aliases_and_files(tmp_path: Path) -> None:
    picture = photo("astronaut", 96, 80)
    picture.save(tmp_path / "result.png")
    annotators.annotate("canny", picture, low=20, high=60).save(tmp_path / "control.png")
    files = tmp_path / "control.png", tmp_path / "result.png"
    assert metrics.condition_error("canny", *files, low=20, high=60) == ("edge_f1", 1)
    assert metrics.condition_error("canny", *files)[1] < 1
    assert metrics.condition_error("gray", picture.convert("L"), picture) == ("rmse", 0)


def test_condition_error_of_depth(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64,
        patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
    )  # fmt: skip
    transformers.DPTForDepthEstimation(config).save_pretrained(tmp_path)
    transformers.DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    check("depth", photo("astronaut", 64, 64), photo("coffee", 64, 64), "depth_rmse", model=str(tmp_path))


def test_condition_error_of_segmentation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=7,
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    check("segmentation", photo("astronaut", 64, 64), photo("coffee", 64, 64), "mean_iou", model=str(tmp_path))


def test_condition_error_of_pose(tmp_path: Path) -> None:
    model = pose_folder(tmp_path, score=0.9)  # sees the same person in every picture
    picture = photo("astronaut", 128, 96)
    control = annotators.annotate("pose", picture, model=model, parts="body")
    assert metrics.condition_error("pose", control, picture, model=model, parts="body") == ("skeleton_iou", 1)
    moved = Image.new("RGB", control.size)
    moved.paste(control, (30, 0))
    name, value = metrics.condition_error("pose", moved, picture, model=model, parts="body")
    assert name == "skeleton_iou" and value < 0.9


def test_a_drawing_scores_by_its_lines() -> None:
    drawing = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(drawing).ellipse((10, 10, 50, 50), outline="black")
    control = annotators.annotate("lineart", drawing)
    f1 = []
    for shift in (0, 1, 20):
        result = Image.new("RGB", (64, 64), "white")
        result.paste(drawing, (shift, 0))
        f1.append(metrics.condition_error("lineart", control, result)[1])
    assert f1[0] == pytest.approx(1) and f1[1] == pytest.approx(1) and f1[2] < 0.25


@pytest.mark.parametrize("annotator", sorted(WITHOUT_MEASURE))
def test_annotators_without_a_measure_name_those_with_one(annotator: str) -> None:
    with pytest.raises(MahlstickError, match=rf"'{annotator}' has no measure") as caught:
        metrics.condition_error(annotator, photo(), photo())
    for name in set(annotators.names()) - WITHOUT_MEASURE:
        assert name in str(caught.value)


def test_condition_error_says_what_does_not_fit() -> None:
    with pytest.raises(MahlstickError, match="control is 96x80 and the result 80x96"):
        metrics.condition_error("grey", photo(width=96, height=80), photo(width=80, height=96))
    with pytest.raises(MahlstickError, match=r"\(16, 16\) and what was found \(8, 8\)"):
        metrics.edge_f1(vertical(8), vertical(2, size=8))


def test_which_way_is_better() -> None:
    better = {name: metrics.higher_is_better(name) for name in ("edge_f1", "recall_at_5", "clip_t", "mean_iou")}
    worse = {name: metrics.higher_is_better(name) for name in ("rmse", "normal_angle", "frechet_distance")}
    assert all(better.values()) and not any(worse.values())
    by_networks = {"itm", "vqa_accuracy", "entailed", "contradicted", "likeness"}
    for name in metrics._HIGHER_IS_BETTER.keys() - by_networks:
        assert callable(getattr(metrics, name)), "a measure is named after its function"
    with pytest.raises(MahlstickError, match="'beauty' is unknown; use one of edge_f1"):
        metrics.higher_is_better("beauty")


# ---- encoders


WORDS = ["a red fox", "a blue moon", "an owl in a tree at night"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    text, vision = tiny.text_encoder().config.to_dict(), tiny.image_encoder().config.to_dict()
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    tiny.feature_extractor().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SigLIP in a folder; its text tower takes 16 tokens."""
    folder = tmp_path_factory.mktemp("siglip")
    size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = size | {"vocab_size": 514, "max_position_embeddings": 16, "pad_token_id": 513, "eos_token_id": 513}
    config = transformers.SiglipConfig(text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    transformers.SiglipModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_judge_loads_and_gives_unit_vectors(kind: str, request: pytest.FixtureRequest) -> None:
    judge = metrics.ClipJudge.load(str(request.getfixturevalue(kind)))
    seen, read = judge.images([tiny.picture(seed) for seed in range(3)]), judge.texts(WORDS)
    assert seen.shape == read.shape == (3, 24 if kind == "clip" else 32) and seen.dtype == np.float64
    for rows in (seen, read):
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1)
        assert metrics.cosines(rows[:2], rows[1:]).max() < 1 - 1e-6, "different things differ"
    one_by_one = np.concatenate([judge.texts([word]) for word in WORDS])
    assert one_by_one == pytest.approx(read, abs=1e-6)
    assert judge.images([tiny.picture(2)]) == pytest.approx(seen[2:], abs=1e-6)
    assert judge.texts(["owl " * 200]).shape == (1, read.shape[1]), "long texts are cut"


def test_the_judge_is_the_models_own(clip: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    both = transformers.CLIPProcessor(tiny.feature_extractor(), tiny.tokenizer())
    pictures = [tiny.picture(seed) for seed in range(3)]
    with torch.no_grad():
        out = model(**both(text=WORDS, images=pictures, padding=True, return_tensors="pt"))
    judge = metrics.ClipJudge.load(str(clip))
    assert judge.images(pictures) == pytest.approx(out.image_embeds.numpy(), abs=1e-5)
    assert judge.texts(WORDS) == pytest.approx(out.text_embeds.numpy(), abs=1e-5)
    cosine = (out.logits_per_image / model.logit_scale.exp()).diag().mean().item()
    assert metrics.clip_t(judge.images(pictures), judge.texts(WORDS)) == pytest.approx(cosine, abs=1e-5)


def test_separate_towers() -> None:
    judge = metrics.ClipJudge.of_towers(
        tiny.text_encoder(), tiny.tokenizer(), tiny.image_encoder(), tiny.feature_extractor()
    )
    inputs = tiny.tokenizer()(WORDS, padding="max_length", return_tensors="pt")
    pixels = tiny.feature_extractor()(tiny.picture(), return_tensors="pt")
    with torch.no_grad():
        pooled = tiny.text_encoder()(**inputs).pooler_output.numpy()
        embeds = tiny.image_encoder()(**pixels).image_embeds.numpy()
    assert metrics.cosines(judge.texts(WORDS), pooled) == pytest.approx(1)
    assert metrics.cosines(judge.images([tiny.picture()]), embeds) == pytest.approx(1)
    projected = metrics.ClipJudge.of_towers(
        tiny.text_encoder(projection=True), tiny.tokenizer(), tiny.image_encoder(), tiny.feature_extractor()
    )
    with torch.no_grad():
        embeds = tiny.text_encoder(projection=True)(**inputs).text_embeds.numpy()
    assert metrics.cosines(projected.texts(WORDS), embeds) == pytest.approx(1)


def test_a_batch_is_no_limit(clip: Path) -> None:
    judge = metrics.ClipJudge.load(str(clip))
    pictures = [tiny.picture(seed) for seed in range(metrics._BATCH + 1)]
    seen = judge.images(pictures)
    assert seen.shape == (metrics._BATCH + 1, 24)
    assert seen[-1:] == pytest.approx(judge.images(pictures[-1:]), abs=1e-6)
    assert judge.images([np.asarray(pictures[0])]) == pytest.approx(seen[:1], abs=1e-6), "arrays too"
    with pytest.raises(MahlstickError, match="nothing to encode"):
        judge.images([])


def test_towers_as_training_writes_them(tmp_path: Path) -> None:
    parts = {"text_encoder": tiny.text_encoder(), "image_encoder": tiny.image_encoder()}
    for name, part in (parts | {"tokenizer": tiny.tokenizer(), "feature_extractor": tiny.feature_extractor()}).items():
        part.save_pretrained(tmp_path / name)
    judge = metrics.ClipJudge.load(str(tmp_path))
    given = metrics.ClipJudge.of_towers(
        *(parts["text_encoder"], tiny.tokenizer(), parts["image_encoder"]), tiny.feature_extractor()
    )
    assert judge.texts(WORDS) == pytest.approx(given.texts(WORDS), abs=1e-6)
    assert judge.images([tiny.picture()]) == pytest.approx(given.images([tiny.picture()]), abs=1e-6)
    (tmp_path / "image_encoder" / "model.safetensors").unlink()
    with pytest.raises(MahlstickError, match="the two towers of a CLIP"):
        metrics.ClipJudge.load(str(tmp_path))


def test_half_precision(clip: Path) -> None:
    exact, judge = metrics.ClipJudge.load(str(clip)), metrics.ClipJudge.load(str(clip))
    judge.model.to(torch.bfloat16)
    assert metrics.clip_i(judge.images([tiny.picture()]), exact.images([tiny.picture()])) == pytest.approx(1, abs=1e-2)
    assert metrics.clip_t(judge.texts(WORDS), exact.texts(WORDS)) == pytest.approx(1, abs=1e-2)


def test_a_judge_needs_both_towers_and_all_weights(clip: Path, tmp_path: Path) -> None:
    tiny.image_encoder().save_pretrained(tmp_path / "eyes")
    tiny.feature_extractor().save_pretrained(tmp_path / "eyes")
    with pytest.raises(MahlstickError, match="eyes' is a CLIPVisionModel"):
        metrics.ClipJudge.load(str(tmp_path / "eyes"))
    with pytest.raises(MahlstickError, match="no-folder"):
        metrics.ClipJudge.load(str(tmp_path / "no-folder"))
    model = transformers.CLIPModel.from_pretrained(clip)
    state = {key: value for key, value in model.state_dict().items() if "visual_projection" not in key}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    tiny.feature_extractor().save_pretrained(tmp_path / "part")
    for load in (metrics.ClipJudge.load, metrics.feature_network):
        with pytest.raises(MahlstickError, match="lacks the weights visual_projection"):
            load(str(tmp_path / "part"))


def test_cosines_and_their_means() -> None:
    a, b = np.array([[2.0, 0], [0, 3], [1, 1]]), np.array([[5.0, 0], [0, -1], [0, 1]])
    assert metrics.cosines(a, b) == pytest.approx([1, -1, math.sqrt(0.5)])
    assert metrics.clip_t(a, b) == metrics.clip_i(a, b) == pytest.approx(math.sqrt(0.5) / 3)
    with pytest.raises(MahlstickError, match="one size"):
        metrics.clip_t(a, b[:1])


# ---- recall


def test_recall_of_a_small_example() -> None:
    texts = np.eye(4)
    images = np.array([[9, 1, 1, 0], [5, 4, 0, 0], [3, 2, 1, 0], [4, 3, 2, 1]])  # own text at rank 1, 2, 3, 4
    assert [metrics.recall_at(k, images, texts) for k in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1, 1]
    assert metrics.recall_at(1, images, texts, correct=[0, 0, 0, 0]) == 1
    assert metrics.recall_at(1, images[:2], texts, correct=[0, 1]) == 0.5


def test_recall_of_an_encoder_that_tells_nothing_apart_is_chance() -> None:
    rounding = np.random.default_rng(0).normal(0, 1e-12, (5, 3))
    for same in (np.ones((5, 3)), np.ones((5, 3)) + rounding):
        assert [metrics.recall_at(k, same, same) for k in (1, 2, 5)] == pytest.approx([0.2, 0.4, 1])


@quickly
@given(hnp.arrays(np.float64, (2, 6, 3), elements=st.floats(-1, 1, width=16)), st.permutations(range(6)))
def test_recall_grows_with_k_and_does_not_depend_on_the_order_of_the_texts(rows: np.ndarray, order: list[int]) -> None:
    images, texts = rows
    recalls = [metrics.recall_at(k, images, texts) for k in range(1, 7)]
    assert recalls == sorted(recalls) and recalls[0] >= 0 and recalls[-1] == pytest.approx(1)
    places = np.argsort(order)
    shuffled = [metrics.recall_at(k, images, texts[order], correct=places) for k in range(1, 7)]
    assert shuffled == pytest.approx(recalls)


def test_recall_of_pictures() -> None:
    """Two texts with two pictures and one; a picture of nothing is a rival of both."""
    texts = np.eye(3)
    images = np.array([[0.9, 0.1, 0], [0, 1.0, 0.2], [0, 1.0, 0.5], [0.5, 0.6, 0.1]])
    assert metrics.image_recall_at(1, texts, images, [0, 0, 1, -1]) == 0.5, "the second text's is second"
    assert metrics.image_recall_at(2, texts, images, [0, 0, 1, -1]) == 1
    square = np.random.default_rng(0).normal(size=(2, 6, 4))
    assert metrics.image_recall_at(1, *square, range(6)) == metrics.recall_at(1, square[0], square[1])
    assert metrics.image_recall_at(1, texts, np.ones((4, 3)), [0, 1, 2, -1]) == 0.25, "chance"
    with pytest.raises(MahlstickError, match="no text has a picture"):
        metrics.image_recall_at(1, texts, images, [-1] * 4)
    with pytest.raises(MahlstickError, match="k is 0"):
        metrics.image_recall_at(0, texts, images, [0, 0, 1, -1])


def test_text_wins() -> None:
    assert [metrics.text_wins(np.array([1.0, 2, 2]), own, other) for own, other in ((1, 0), (0, 1), (1, 2))] == [
        1,
        0,
        0.5,
    ]


def test_clip_i_is_a_cosine() -> None:
    assert metrics.clip_i([[1.0, 0], [0, 2.0]], [[3.0, 0], [1.0, 0]]) == 0.5


def test_recall_says_what_is_missing() -> None:
    with pytest.raises(MahlstickError, match="k is 0"):
        metrics.recall_at(0, np.eye(3), np.eye(3))
    for correct in (None, [0, 1]):
        with pytest.raises(MahlstickError, match="3 pictures have 2 texts"):
            metrics.recall_at(1, np.eye(3), np.eye(3)[:2], correct=correct)


# ---- Fréchet distance


def gaussian(count: int, mean: list[float], deviation: list[float]) -> np.ndarray:
    """Points whose sample mean and covariance, diagonal, are exactly those."""
    rows = np.random.default_rng(count).standard_normal((count, len(mean)))
    rows -= rows.mean(axis=0)
    white, _ = np.linalg.qr(rows)
    return white * math.sqrt(count - 1) * deviation + mean


def test_frechet_distance_of_gaussians_that_share_axes() -> None:
    a, b = gaussian(50, [0, 1, 2], [1, 2, 3]), gaussian(80, [3, 1, -2], [4, 2, 0.5])
    # (3² + 0 + 4²) + (1 − 4)² + (2 − 2)² + (3 − 0.5)²
    assert metrics.frechet_distance(a, b) == pytest.approx(25 + 9 + 0 + 6.25)


def test_frechet_distance_is_the_formula() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 5)) @ rng.random((5, 5)), rng.standard_normal((30, 5)) @ rng.random((5, 5)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(axis=0) - b.mean(axis=0)
    formula = difference @ difference + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(formula)
    assert metrics.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(formula)


def test_frechet_distance_of_fewer_pictures_than_dimensions() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 4, 64))
    assert 0 < metrics.frechet_distance(*rows) < np.inf
    assert metrics.frechet_distance(rows[0], rows[0]) == pytest.approx(0, abs=1e-9)
    # In orthogonal planes nothing is common: the distance is that of the means, and all the spread.
    flat_a, flat_b = np.zeros((3, 9)), np.zeros((3, 9))
    flat_a[:, :2], flat_b[:, 5:7] = [[0, 0], [1, 0], [0, 1]], [[0, 0], [2, 0], [0, 2]]
    apart = np.square(flat_a.mean(0) - flat_b.mean(0)).sum() + flat_a.var(0, ddof=1).sum() + flat_b.var(0, ddof=1).sum()
    assert metrics.frechet_distance(flat_a, flat_b) == pytest.approx(apart)


@quickly
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(2, 9), st.just(4)), elements=st.floats(-9, 9, width=16)),
    hnp.arrays(np.float64, st.tuples(st.integers(2, 9), st.just(4)), elements=st.floats(-9, 9, width=16)),
    st.lists(st.floats(-9, 9), min_size=4, max_size=4),
)
def test_frechet_distance_is_symmetric_and_does_not_feel_a_common_shift(
    a: np.ndarray, b: np.ndarray, shift: list[float]
) -> None:
    distance = metrics.frechet_distance(a, b)
    assert 0 <= distance == pytest.approx(metrics.frechet_distance(b, a), abs=1e-9)
    assert metrics.frechet_distance(a + shift, b + shift) == pytest.approx(distance, abs=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(np.square(shift).sum(), abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), "at least two pictures"),
        (np.ones(3), np.ones(3), "at least two pictures"),
        (np.full((3, 3), np.nan), np.ones((3, 3)), "finite"),
        (np.ones((3, 3)), np.ones((3, 4)), "3 and 4 dimensions"),
    ],
)
def test_frechet_distance_of_what_it_cannot_measure(a: np.ndarray, b: np.ndarray, words: str) -> None:
    with pytest.raises(MahlstickError, match=words):
        metrics.frechet_distance(a, b)


# ---- feature networks


def vit(folder: Path, pooler: bool = True) -> transformers.ViTModel:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config, add_pooling_layer=pooler).eval()
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def test_features_are_the_pooled_output_where_the_pooler_was_trained(tmp_path: Path) -> None:
    pictures = [tiny.picture(seed) for seed in range(3)]
    pixels = transformers.ViTImageProcessor(size={"height": 32, "width": 32})(pictures, return_tensors="pt")
    for pooler in (True, False):
        folder = tmp_path / f"{pooler}"
        with torch.no_grad():
            out = vit(folder, pooler)(**pixels)
        expected = out.pooler_output if pooler else out.last_hidden_state.mean(1)
        features = metrics.feature_network(str(folder))(pictures)
        assert features == pytest.approx(expected.numpy(), abs=1e-5)
        again = metrics.feature_network(str(folder))(pictures)
        assert np.array_equal(features, again), "no weight is random"


def test_features_of_convolutional_networks(tmp_path: Path) -> None:
    pictures = [tiny.picture(seed) for seed in range(3)]
    torch.manual_seed(0)
    size = {"hidden_sizes": [8, 12], "depths": [1, 1]}
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, layer_type="basic", **size))
    stages = transformers.SegformerConfig(
        num_encoder_blocks=2, sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], **size,
    )  # fmt: skip
    for name, model in (("resnet", resnet), ("segformer", transformers.SegformerModel(stages))):
        model.save_pretrained(tmp_path / name)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
        features = metrics.feature_network(str(tmp_path / name))(pictures)
        assert features.shape == (3, 12) and np.ptp(features, axis=0).max() > 0


def test_features_of_a_clip_are_its_image_embeddings(clip: Path) -> None:
    pictures = [tiny.picture(seed) for seed in range(3)]
    features = metrics.feature_network(str(clip))(pictures)
    judge = metrics.ClipJudge.load(str(clip))
    assert metrics.cosines(features, judge.images(pictures)) == pytest.approx(1)
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


# ---- intervals


def test_interval_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean, low, high = metrics.mean_with_interval(values)
    assert mean == pytest.approx(values.mean())
    error = values.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    _, inner_low, inner_high = metrics.mean_with_interval(values, level=0.5)
    assert low < inner_low < mean < inner_high < high
    assert metrics.mean_with_interval(values) == (mean, low, high)
    assert metrics.mean_with_interval(values, seed=1) != (mean, low, high)
    assert metrics.mean_with_interval([3.0]) == (3, 3, 3)
    with pytest.raises(MahlstickError, match="at least one"):
        metrics.mean_with_interval([])
