"""Learned annotators: loaded on first use, kept, and clear about what they need when it is missing."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mahlstick import pictures
from mahlstick.errors import MahlstickError

_FILES = {
    "HEDdetector": "ControlNetHED.pth",
    "LineartDetector": "sk_model.pth with sk_model2.pth",
    "MLSDdetector": "mlsd_large_512_fp32.pth",
}


@lru_cache(maxsize=4)
def detector(name: str, model: str) -> Any:
    """A detector class of controlnet-aux with weights from a local folder or a hub id."""
    with _quiet():
        import controlnet_aux
    kind = getattr(controlnet_aux, name)
    return load(model, _FILES[name], lambda local: kind.from_pretrained(model, local_files_only=local))


def detect(name: str, model: str, picture: Image.Image, resolution: int, **options: Any) -> Image.Image:
    """Run a detector with the shorter side at about ``resolution`` pixels, and give back the picture's own size."""
    size = working_size(picture.size, resolution)
    found = detector(name, model)(
        pictures.resize(picture, size), detect_resolution=min(size), image_resolution=min(size), **options
    )
    return pictures.resize(found.convert("RGB"), picture.size)


def working_size(size_wh: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) in multiples of 64, which the detectors leave as it is.

    The longer side is at most four times the shorter: a strip one pixel high would otherwise grow without bound.
    """
    shorter = max(1, round(resolution / 64))
    width, height = (min(4 * shorter, max(1, round(shorter * side / min(size_wh)))) for side in size_wh)
    return width * 64, height * 64


@lru_cache(maxsize=2)
def depth_estimator(model: str) -> Any:
    """A depth-estimation pipeline of transformers."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation, pipeline

    def load_pipeline(local: bool) -> Any:
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=local)
        network = AutoModelForDepthEstimation.from_pretrained(model, local_files_only=local)
        return pipeline("depth-estimation", model=network, image_processor=processor, device="cpu")

    return load(model, "a depth-estimation model of transformers", load_pipeline)


@lru_cache(maxsize=2)
def segmenter(model: str) -> tuple[Any, Any]:
    """(image processor, model) of transformers, for semantic or universal segmentation."""
    import transformers

    def load_both(local: bool) -> tuple[Any, Any]:
        config = transformers.AutoConfig.from_pretrained(model, local_files_only=local)
        universal = type(config) in transformers.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        family = "AutoModelForUniversalSegmentation" if universal else "AutoModelForSemanticSegmentation"
        processor = transformers.AutoImageProcessor.from_pretrained(model, local_files_only=local)
        return processor, getattr(transformers, family).from_pretrained(model, local_files_only=local).eval()

    return load(model, "a segmentation model of transformers", load_both)


@lru_cache(maxsize=2)
def pose_estimator(model: str) -> tuple[Any, Any]:
    """(person detector, pose network) of rtmlib: its own downloads, or detector.onnx and pose.onnx in a folder."""
    try:
        from rtmlib import YOLOX, RTMPose, Wholebody
    except ImportError as error:
        raise MahlstickError("pose needs rtmlib; install mahlstick[pose]") from error

    def load_both(_: bool) -> tuple[Any, Any]:
        if model == "rtmw":
            both = Wholebody(to_openpose=True)
            return both.det_model, both.pose_model
        files = [Path(model) / name for name in ("detector.onnx", "pose.onnx")]
        for file in files:
            if not file.is_file():  # rtmlib would take the name for an address
                raise FileNotFoundError(f"{file.name} is missing")
        people = YOLOX(str(files[0]))
        pose = RTMPose(str(files[1]), to_openpose=True)
        # The files know their input size, (batch, 3, height, width); rtmlib asks for it, each in its own order.
        people.model_input_size = tuple(people.session.get_inputs()[0].shape[2:])
        pose.model_input_size = tuple(pose.session.get_inputs()[0].shape[:1:-1])
        return people, pose

    with contextlib.redirect_stdout(io.StringIO()):  # rtmlib prints what it loads
        return load(model, "detector.onnx with pose.onnx", load_both)


def load(
    model: str,
    needed: str,
    loader: Callable[[bool], Any],
    way_out: str = "give model= a folder that holds it, or a hub id when online",
) -> Any:
    """What ``loader(local_files_only)`` gives, or a MahlstickError that says what is missing and the way out."""
    local = Path(model).is_dir()
    offline = not local and not _hub_answers(model)
    try:
        return loader(local or offline)
    except Exception as error:  # hub, network, file and pickle errors share no base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if offline:
            reason = "no such folder, not in the cache, and the hub does not answer"
        raise MahlstickError(f"{needed} cannot be loaded from {model!r} ({reason}); {way_out}") from error


def _hub_answers(model: str) -> bool:
    """Whether asking the hub makes sense. Its own client would try again for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(model, timeout=5)
    except HfHubHTTPError:  # it answered: no such model, or not for everyone
        return True
    except Exception:  # no connection, offline mode, no hub id: each HTTP library has its own errors
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """controlnet-aux warns at import of packages that only its other detectors want."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ade_palette() -> list[list[int]]:
    """The 150 colours of ADE20K that ControlNet's segmentation nets were trained on."""
    with _quiet():
        from controlnet_aux.util import ade_palette as palette
    return palette()
