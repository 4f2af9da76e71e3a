"""Numbers that say whether an adapter or a base works.

    from mahlstick.training import metrics

    name, value = metrics.condition_error("canny", control, result, low=50, high=150)  # ("edge_f1", 0.83)
    mean, low, high = metrics.mean_with_interval(values)

`condition_error` says whether a picture kept its control, `ClipJudge` whether it shows the words or the reference,
`frechet_distance` whether many pictures look like many others. All are pure functions of arrays; a picture or a map
is bool, uint8 (white is 255), or floats in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mahlstick import annotators, pictures
from mahlstick.annotators import weights
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

    from mahlstick.pictures import PictureSource

    Array = np.ndarray[Any, Any]

#: Standard deviations of where people put COCO's 17 keypoints, relative to the square root of the area, in COCO's
#: order: nose, then left and right eye, ear, shoulder, elbow, wrist, hip, knee, ankle (COCO's keypoint evaluation).
COCO_SIGMAS = (0.026, *(s for s in (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089) for _ in ("left", "right")))

_HIGHER_IS_BETTER = {
    "edge_f1": True,
    "mask_iou": True,
    "mean_iou": True,
    "skeleton_iou": True,
    "pose_oks": True,
    "clip_t": True,
    "clip_i": True,
    "recall_at": True,
    "image_recall_at": True,
    "itm": True,
    "vqa_accuracy": True,
    "entailed": True,
    "contradicted": False,
    "named_at": True,
    "text_wins": True,
    "likeness": True,
    "rmse": False,
    "psnr": True,
    "depth_rmse": False,
    "normal_angle": False,
    "frechet_distance": False,
}
_BATCH = 32


def higher_is_better(name: str) -> bool:
    """Whether more of the measure is better: by its function's name, or ``recall_at_1`` and so on."""
    known = _HIGHER_IS_BETTER.get(re.sub(r"^((?:image_)?recall_at|named_at)_\d+$", r"\1", name))
    if known is None:
        raise MahlstickError(f"measure {name!r} is unknown; use one of {', '.join(_HIGHER_IS_BETTER)}")
    return known


# ---- a condition that was wanted, and the one found in the result


def edge_f1(wanted: ArrayLike, found: ArrayLike, tolerance: int = 1) -> float:
    """F1 of two edge maps (H, W), in [0, 1]; edges are brighter than half white.

    An edge pixel counts as found when the other map has one at most ``tolerance`` rows and columns away: the precision
    and recall of the BSDS benchmark (Martin et al. 2004) without its one-to-one matching. Two empty maps agree (1);
    of one empty map nothing is found (0).
    """
    import cv2

    maps = [edges > 0.5 for edges in _pair(wanted, found)]
    drawn = [bool(edges.any()) for edges in maps]
    if not all(drawn):
        return float(drawn[0] == drawn[1])
    square = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    near = [cv2.dilate(edges.astype(np.uint8), square) > 0 for edges in maps]
    precision, recall = near[0][maps[1]].mean(), near[1][maps[0]].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def mask_iou(wanted: ArrayLike, found: ArrayLike, threshold: float = 0.5) -> float:
    """Intersection over union of two masks (H, W), set above ``threshold``; in [0, 1], two empty masks agree (1)."""
    a, b = (mask > threshold for mask in _pair(wanted, found))
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def mean_iou(wanted: ArrayLike, found: ArrayLike) -> float:
    """Mean intersection over union of two maps of labels (H, W), over the labels that at least one map has."""
    labels, inverse = np.unique(np.stack(_same_shape(wanted, found)), return_inverse=True)
    a, b = inverse.reshape(2, -1)
    shared, in_a, in_b = (np.bincount(part, minlength=len(labels)) for part in (a[a == b], a, b))
    return float((shared / (in_a + in_b - shared)).mean())


def skeleton_iou(wanted: ArrayLike, found: ArrayLike, reach: int = 3) -> float:
    """`mask_iou` of two drawn skeletons (H, W, 3) on black, each widened by ``reach`` pixels; for want of keypoints.

    It knows no joints: a right arm where the left was wanted is no error. `pose_oks` is the better measure where the
    keypoints are at hand.
    """
    import cv2

    square = np.ones((2 * reach + 1,) * 2, np.uint8)
    quarter = 0.25  # limbs are drawn darker than white, and a compressed black is not quite black
    masks = [(drawn.max(axis=2) > quarter).astype(np.uint8) for drawn in _pair(wanted, found)]
    return mask_iou(*(cv2.dilate(mask, square) > 0 for mask in masks))


def rmse(wanted: ArrayLike, found: ArrayLike) -> float:
    """Root of the mean squared difference, in [0, 1]."""
    a, b = _pair(wanted, found)
    return float(np.sqrt(np.square(a - b).mean()))


def psnr(wanted: ArrayLike, found: ArrayLike) -> float:
    """Peak signal-to-noise ratio in decibels: −20 log₁₀ of the `rmse`, and at most 100."""
    return float(-20 * np.log10(max(rmse(wanted, found), 1e-5)))


def depth_rmse(wanted: ArrayLike, found: ArrayLike) -> float:
    """`rmse` of relative depth (H, W) after scaling and shifting ``found`` to ``wanted`` by least squares.

    That is the alignment of MiDaS's loss (arXiv 1907.01341), with a scale that is not negative: depth turned inside
    out is no match. At most the standard deviation of ``wanted``, which a flat ``found`` gives; not symmetric.
    """
    a, b = _pair(wanted, found)
    centred = b - b.mean()
    scale = max(0.0, (a * centred).sum() / np.square(centred).sum()) if np.ptp(b) else 0.0
    return rmse(a, scale * centred + a.mean())


def normal_angle(wanted: ArrayLike, found: ArrayLike) -> float:
    """Mean angle between two maps of surface normals (H, W, 3), vectors of any length, in degrees from 0 to 180."""
    a, b = (vectors.astype(np.float64) for vectors in _same_shape(wanted, found))
    across, along = np.linalg.norm(np.cross(a, b), axis=2), (a * b).sum(axis=2)
    return float(np.degrees(np.arctan2(across, along)).mean())


def pose_oks(wanted: ArrayLike, found: ArrayLike, area: float, sigmas: Sequence[float] = COCO_SIGMAS) -> float:
    """COCO's object keypoint similarity of one person, in [0, 1].

    ``wanted`` and ``found`` are (K, 3): x, y in pixels and visibility, in the order of ``sigmas`` (COCO's 17 unless
    given). ``area`` is the person's, in pixels². The mean over the keypoints visible in ``wanted`` of
    exp(−d² / (2 area (2σ)²)); one whose visibility in ``found`` is 0 was not found and counts 0.
    """
    a, b = (np.asarray(points, np.float64) for points in (wanted, found))
    if not a.shape == b.shape == (len(sigmas), 3):
        raise MahlstickError(f"the poses are {a.shape} and {b.shape}; give both as ({len(sigmas)}, 3), or their sigmas")
    visible = a[:, 2] > 0
    if not visible.any():
        raise MahlstickError("no keypoint of the wanted pose is visible; leave this person out")
    if not area > 0:
        raise MahlstickError(f"the person's area is {area:g}; give it in square pixels, more than 0")
    squared = np.square(a - b)[:, :2].sum(axis=1)
    similarity = np.exp(-squared / (2 * area * np.square(2 * np.asarray(sigmas))))
    return float(np.where(b[:, 2] > 0, similarity, 0.0)[visible].mean())


def condition_error(annotator: str, control: PictureSource, result: PictureSource, **options: Any) -> tuple[str, float]:
    """(the measure's name, its value): how far ``result`` is from the control picture that it was made with.

    The annotator, told ``options`` as when it made ``control``, looks at ``result``, and what it finds is compared
    with ``control`` in the way of its family:

    - lines: `edge_f1`; soft lines are split at half white too, so their fainter half does not count
    - mask: `mask_iou`; segmentation: `mean_iou` of its exact colours
    - depth: `depth_rmse`; normal: `normal_angle`; pose: `skeleton_iou`
    - tile, color, grey: `rmse`

    Raises MahlstickError for an annotator of another family, and for pictures that differ in size.
    """
    known, name = annotators.get(annotator), measure_of(annotator)
    measure = _MEASURES[known.name][1]
    wanted = pictures.load_picture(control, name="control")
    found = known(result, **options)
    if wanted.size != found.size:
        control_size, result_size = ("x".join(map(str, picture.size)) for picture in (wanted, found))
        raise MahlstickError(f"the control is {control_size} and the result {result_size}; bring both to one size")
    return name, measure(np.asarray(wanted), np.asarray(found))


def measure_of(annotator: str) -> str:
    """The name of the measure that `condition_error` takes. Raises MahlstickError for an annotator that has none."""
    known = annotators.get(annotator)
    if known.name not in _MEASURES:
        raise MahlstickError(f"annotator {annotator!r} has no measure; one of these has: {', '.join(_MEASURES)}")
    return _MEASURES[known.name][0]


def _of_brightness(measure: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    return lambda wanted, found: measure(wanted.mean(axis=2) / 255, found.mean(axis=2) / 255)


def _of_colours(wanted: Array, found: Array) -> float:
    place = np.array([1 << 16, 1 << 8, 1])
    return mean_iou(wanted @ place, found @ place)


def _of_normals(wanted: Array, found: Array) -> float:
    return normal_angle(wanted / 127.5 - 1, found / 127.5 - 1)


_LINES = ("canny", "softedge", "lineart", "lineart_realistic", "scribble", "mlsd")
_MEASURES: dict[str, tuple[str, Callable[[Array, Array], float]]] = {
    **dict.fromkeys(_LINES, ("edge_f1", _of_brightness(edge_f1))),
    "depth": ("depth_rmse", _of_brightness(depth_rmse)),
    "normal": ("normal_angle", _of_normals),
    "pose": ("skeleton_iou", skeleton_iou),
    "segmentation": ("mean_iou", _of_colours),
    **dict.fromkeys(("tile", "color", "grey"), ("rmse", rmse)),
    "mask": ("mask_iou", _of_brightness(mask_iou)),
}


def _same_shape(wanted: ArrayLike, found: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(wanted), np.asarray(found)
    if a.shape != b.shape or not a.size:
        raise MahlstickError(f"what was wanted is {a.shape} and what was found {b.shape}; bring both to one size")
    return a, b


def _pair(wanted: ArrayLike, found: ArrayLike) -> tuple[Array, Array]:
    """Both as float64, of one shape, uint8 scaled to [0, 1]."""
    a, b = (np.asarray(part) / (255 if part.dtype == np.uint8 else 1.0) for part in _same_shape(wanted, found))
    return a, b


# ---- pictures, words and references in the space of a CLIP-like encoder


@dataclass(frozen=True)
class ClipJudge:
    """Pictures and words as unit vectors in the one space of a CLIP-like encoder: CLIP, SigLIP, … of transformers.

    ``model`` has ``get_image_features`` and ``get_text_features``, or reads pictures only, and ``text_model`` the words
    (`of_towers`). Scores compare only within one encoder, and an adapter's own encoder flatters it.
    """

    model: Any
    processor: Any
    tokenizer: Any
    text_model: Any = None

    @classmethod
    def load(cls, model: str, device: str = "cpu") -> ClipJudge:
        """From a folder or hub id with the model, its image processor and its tokenizer; or from a folder with the two
        towers as ``mahlstick train clip`` writes them."""
        towers = all(Path(model, part).is_dir() for part in ("text_encoder", "image_encoder"))
        # In a pipeline's folder they need not have learned together.
        if towers and not Path(model, "model_index.json").exists():
            return cls._load_towers(Path(model), device)
        network, processor, missing = _load(model, device)
        if not hasattr(network, "get_text_features") or not hasattr(network, "get_image_features"):
            kind = type(network).__name__
            raise MahlstickError(f"{model!r} is a {kind}, which does not read both words and pictures; give a CLIP")
        refuse_untrained(model, missing)

        return cls(network, processor, _load_tokenizer(model))

    @classmethod
    def _load_towers(cls, folder: Path, device: str) -> ClipJudge:
        import transformers

        def load_all(local: bool) -> tuple[Any, Any, Any]:
            text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
            image = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
            processor = transformers.AutoImageProcessor.from_pretrained(folder / "feature_extractor")
            return text.eval().to(device), image.eval().to(device), processor

        text, image, processor = weights.load(str(folder), "the two towers of a CLIP", load_all)
        widths = text.config.hidden_size, image.config.projection_dim
        if widths[0] != widths[1]:
            raise MahlstickError(f"{str(folder)!r} holds towers of {widths[0]} and {widths[1]} numbers; give a CLIP's")
        return cls.of_towers(text, _load_tokenizer(str(folder / "tokenizer")), image, processor)

    @classmethod
    def of_towers(cls, text_model: Any, tokenizer: Any, image_model: Any, image_processor: Any) -> ClipJudge:
        """From two networks whose projected or pooled outputs are in one space, which the caller has to know."""
        return cls(image_model, image_processor, tokenizer, text_model)

    def images(self, images: Sequence[PictureSource]) -> Array:
        """N pictures → (N, d) unit vectors, float64."""
        see = getattr(self.model, "get_image_features", self.model)
        return _unit_rows(_encode(images, lambda part: _pooled(see(**_pixels(part, self.processor, self.model)))))

    def texts(self, texts: Sequence[str]) -> Array:
        """N texts → (N, d) unit vectors, float64; what goes beyond the model's context is cut off."""
        model = self.model if self.text_model is None else self.text_model
        config = getattr(model.config, "text_config", model.config)
        length = min(self.tokenizer.model_max_length, config.max_position_embeddings)
        read = getattr(model, "get_text_features", model)

        def encode(part: list[str]) -> torch.Tensor:
            # SigLIP was trained on texts of full length and has no mask; to the others the padding makes no difference.
            inputs = self.tokenizer(part, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return _pooled(read(**inputs.to(model.device)))

        return _unit_rows(_encode(texts, encode))


def cosines(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosine of each pair of rows, (N, d) and (N, d) → (N,)."""
    return np.einsum("nd,nd->n", *(_unit_rows(rows) for rows in _same_shape(a, b)))


def clip_t(images: ArrayLike, texts: ArrayLike) -> float:
    """CLIP-T: the mean cosine of pictures (N, d) and their texts (N, d), in [−1, 1].

    It is the plain cosine; CLIPScore (arXiv 2104.08718) is 2.5 times its positive part.
    """
    return float(cosines(images, texts).mean())


def clip_i(images: ArrayLike, references: ArrayLike) -> float:
    """CLIP-I: the mean cosine of pictures (N, d) and their reference pictures (N, d), in [−1, 1].

    Of features by another network than a CLIP (`feature_network`) evaluations call it ``likeness``.
    """
    return float(cosines(images, references).mean())


def recall_at(k: int, images: ArrayLike, texts: ArrayLike, correct: Sequence[int] | None = None) -> float:
    """How often a picture's own text is among the ``k`` nearest of all texts, by cosine; (N, d) and (M, d) → [0, 1].

    ``correct`` (N,) is the place of each picture's text, the picture's own place unless given. Where texts are equally
    near, their order is chance and this its expectation: an encoder that tells nothing apart gets k/M. So give a text
    that belongs to several pictures once, with ``correct``.
    """
    near = _unit_rows(images) @ _unit_rows(texts).T
    own = np.arange(len(near)) if correct is None else np.asarray(correct)
    if own.shape != (len(near),) or (correct is None and near.shape[0] != near.shape[1]):
        raise MahlstickError(f"{near.shape[0]} pictures have {near.shape[1]} texts; say with correct= which is whose")
    return _recall(k, near, own)


def _recall(k: int, near: Array, own: Array) -> float:
    """`recall_at` of cosines (N, M)."""
    if k < 1:
        raise MahlstickError(f"k is {k}; give a whole number of at least 1")
    nearer = near - near[np.arange(len(near)), own][:, None]
    rounding = 1e-9
    before, tied = (nearer > rounding).sum(axis=1), (abs(nearer) <= rounding).sum(axis=1)
    return float(((k - before) / tied).clip(0, 1).mean())


def image_recall_at(k: int, texts: ArrayLike, images: ArrayLike, own: Sequence[int]) -> float:
    """The other way round: how often a picture that belongs to a text is among the ``k`` nearest of all pictures, by
    cosine; (N, d) and (M, d) → [0, 1].

    ``own`` (M,) is the place of each picture's text, −1 where it has none. Of several pictures of one text the nearest
    counts, and the others are no rivals of it. A text without a picture is left out. Pictures equally near are as in
    `recall_at`.
    """
    of, near = np.asarray(own), _unit_rows(images) @ _unit_rows(texts).T
    found = []
    for text in sorted({*of.tolist()} - {-1}):
        mine, rivals = near[of == text, text].max(), near[of != text, text]
        found.append(_recall(k, np.concatenate([[mine], rivals])[None], np.zeros(1, int)))
    if not found:
        raise MahlstickError("no text has a picture; say with own= which picture belongs to which text")
    return float(np.mean(found))


# ---- names


@dataclass(frozen=True)
class Classifier:
    """An image classifier of transformers; ``names`` are its labels, each perhaps several words for one thing."""

    model: Any
    processor: Any
    names: tuple[str, ...]

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        """For each name its words, the longest first."""
        words = (sorted(name.split(", "), key=len, reverse=True) for name in self.names)
        return [re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, of))})(?!\w)", re.IGNORECASE) for of in words]

    @classmethod
    def load(cls, model: str, device: str = "cpu") -> Classifier:
        """From a folder or hub id."""
        network, processor, missing = _load(model, device, "AutoModelForImageClassification")
        refuse_untrained(model, missing)
        return cls(network, processor, tuple(name for _, name in sorted(network.config.id2label.items())))

    def scores(self, images: Sequence[PictureSource]) -> Array:
        """N pictures → (N, names) logits, float64."""
        return _encode(images, lambda part: self.model(**_pixels(part, self.processor, self.model)).logits)

    def named_in(self, caption: str) -> int | None:
        """The index of the first name that the caption holds as whole words, and of those the longest: of "a flat cat
        face on a box" the cat face. Commas in a name part words for the same thing, as ImageNet has them."""
        matches = ((pattern.search(caption), i) for i, pattern in enumerate(self._patterns))
        found = [(match.start(), -len(match[0]), i) for match, i in matches if match]
        return min(found)[2] if found else None


def named_at(k: int, scores: ArrayLike, own: int) -> float:
    """Whether the ``own`` of the names is among the ``k`` likeliest of scores (names,). Where names are equally likely,
    their order is chance and this its expectation. Raises ``MahlstickError`` for scores that are not numbers."""
    row = np.asarray(scores)
    if not np.isfinite(row).all():
        raise MahlstickError("a classifier's scores are NaN or infinite: its weights are broken")
    before, tied = int((row > row[own]).sum()), int((row == row[own]).sum())
    return min(max((k - before) / tied, 0.0), 1.0)


def text_wins(scores: ArrayLike, own: int, other: int) -> float:
    """Whether of scores (names,) the ``own`` name's, which the text gave, is above that of the ``other``, which the
    reference shows; a tie is half."""
    row = np.asarray(scores)
    return float((np.sign(row[own] - row[other]) + 1) / 2)


# ---- many pictures against many others


def feature_network(model: str, device: str = "cpu") -> Callable[[Sequence[PictureSource]], Array]:
    """A function from N pictures to features (N, d) float64, by a vision model of transformers (a folder or a hub id).

    The features are a CLIP-like model's image embeddings, else the network's pooled output, else the mean over its
    patches. Distances compare only within one network, so name it with the number; the published "FID" is that of one
    certain Inception network.
    """
    network, processor, missing = _load(model, device)
    refuse_untrained(model, [key for key in missing if "pooler" not in key])
    see = getattr(network, "get_image_features", network)

    def features(images: Sequence[PictureSource]) -> Array:
        return _encode(images, lambda part: _pooled(see(**_pixels(part, processor, network)), by_pooler=not missing))

    return features


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to features (N, d) and (M, d): FID, arXiv 1706.08500, eq. 6.

    |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½). Works with fewer pictures than dimensions, but is biased upwards by few
    (arXiv 1911.07023): compare only numbers of equally many pictures.
    """
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a), _gaussian(b)
    if mean_a.shape != mean_b.shape:
        raise MahlstickError(f"the features have {len(mean_a)} and {len(mean_b)} dimensions; use one network for both")
    # With C = RᵀR, the eigenvalues of Ca Cb are the squared singular values of Ra Rbᵀ.
    common = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    spread = np.square(root_a).sum() + np.square(root_b).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + spread - 2 * common))


def _gaussian(features: ArrayLike) -> tuple[Array, Array]:
    """The mean (d,), and R (at most d, d) such that RᵀR is the covariance (d, d)."""
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
        raise MahlstickError(f"the features have shape {rows.shape}; give finite (N, d) of at least two pictures")
    mean = rows.mean(axis=0)
    return mean, np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1)).R


def mean_with_interval(
    values: ArrayLike, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the mean of ``values`` (N,) and its percentile bootstrap interval (Efron 1979).

    The interval is of the mean over other pictures of the same kind; of a handful of values it is too narrow.
    """
    numbers = np.asarray(values, np.float64)
    if not numbers.size:
        raise MahlstickError("there are no values to average; give at least one")
    low, high = np.quantile(numbers[_draws(len(numbers), samples, seed)].mean(axis=1), _bounds(level))
    return float(numbers.mean()), float(low), float(high)


def ratio_with_interval(
    values: ArrayLike, others: ArrayLike, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(ratio, low, high): the mean of ``values`` (N,) by that of ``others`` (N,), which are of the same things, and its
    interval as in `mean_with_interval`. Raises ``MahlstickError`` where the mean of the others is not above 0."""
    above, below = (numbers.astype(np.float64) for numbers in _same_shape(values, others))
    if not below.mean() > 0:
        raise MahlstickError(f"there is no ratio to a mean of {below.mean():g}; leave it out")
    draws = _draws(len(above), samples, seed)
    means = above[draws].mean(axis=1), below[draws].mean(axis=1)
    some = means[1] > 0
    low, high = np.quantile(means[0][some] / means[1][some], _bounds(level))
    return float(above.mean() / below.mean()), float(low), float(high)


def _draws(count: int, samples: int, seed: int) -> Array:
    """(samples, count): what each sample of the bootstrap has drawn."""
    return np.random.default_rng(seed).integers(count, size=(samples, count))


def _bounds(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]


# ---- networks


def _load(model: str, device: str, family: str = "AutoModel") -> tuple[Any, Any, set[str]]:
    """(network, image processor, names of the weights that the files lack); ``family``: transformers' class."""

    def load_both(local: bool) -> tuple[Any, Any, set[str]]:
        import transformers

        auto = getattr(transformers, family)
        network, found = auto.from_pretrained(model, local_files_only=local, output_loading_info=True)
        processor = transformers.AutoImageProcessor.from_pretrained(model, local_files_only=local)
        return network.eval().to(device), processor, set(found["missing_keys"])

    kind = "a vision model" if family == "AutoModel" else "an image classifier"
    loaded: tuple[Any, Any, set[str]] = weights.load(model, f"{kind} of transformers", load_both)
    return loaded


def _load_tokenizer(model: str) -> Any:
    def load(local: bool) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model, local_files_only=local)

    return weights.load(model, "a tokenizer of transformers", load)


def refuse_untrained(model: str, missing: Sequence[str] | set[str]) -> None:
    """transformers fills missing weights with random numbers, and the features would mean nothing."""
    if missing:
        raise MahlstickError(f"{model!r} lacks the weights {min(missing)}; give a folder or hub id that has all")


def _pixels(images: Sequence[PictureSource], processor: Any, network: Any) -> Any:
    """The network's inputs, on its device and in its precision."""
    loaded = [pictures.load_picture(image) for image in images]
    return processor(images=loaded, return_tensors="pt").to(network.device, network.dtype)


def _pooled(outputs: Any, by_pooler: bool = True) -> torch.Tensor:
    """One vector a picture or text, (N, d), from a model's outputs."""
    for name in ("image_embeds", "text_embeds", *(["pooler_output"] if by_pooler else [])):
        if (vectors := getattr(outputs, name, None)) is not None:
            return vectors.flatten(1)
    hidden = outputs.last_hidden_state  # (N, patches, d), or (N, d, height, width)
    return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))


def _encode(items: Sequence[Any], encode: Callable[[list[Any]], torch.Tensor]) -> Array:
    """The vectors (N, d) of N items, some at a time."""
    import torch

    if not len(items):
        raise MahlstickError("there is nothing to encode; give at least one picture or text")
    with torch.no_grad():
        parts = [encode(list(items[at : at + _BATCH])).double().cpu() for at in range(0, len(items), _BATCH)]
    return torch.cat(parts).numpy()


def _unit_rows(rows: ArrayLike) -> Array:
    """Rows (N, d) at length 1, float64; a row of zeros stays."""
    vectors = np.asarray(rows, np.float64)
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
