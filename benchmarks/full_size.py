"""SD 1.5- and SDXL-shaped adapters with random weights: ``python -m benchmarks.full_size [sd15] [sdxl]``.

Builds, counts, saves, loads and runs each once, and measures the memory that ``ControlNet.from_unet`` takes beyond the
UNet. SDXL, in float16, needs about 16 GB of memory. docs/full-size.md keeps what it printed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import mahlstick as ms

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
IMAGE_FEATURES = {"sd15": 1024, "sdxl": 1280}


def random_unet(name: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet with small random weights and neutral norms, without first filling it with others."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.zero_()
    for module in unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.weight.fill_(1.0)
    return unet


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most memory beyond the start's, sampled every millisecond; in the list after the block."""
    found, done, before = [0], threading.Event(), resident()

    def watch() -> None:
        while not done.wait(0.001):
            found[0] = max(found[0], resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = max(found[0], resident() - before)


@torch.no_grad()
def check(name: str, dtype: torch.dtype) -> None:
    unet = random_unet(name, dtype)
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, UNETS[name]["cross_attention_dim"], dtype=dtype),
    }
    if name == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 1280, dtype=dtype), "time_ids": torch.ones(1, 6)}
    plain = unet(**inputs).sample
    with peak() as beyond:
        net = ms.ControlNet.from_unet(unet)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    share = f"{beyond[0] / size:.3f} of the copy's {size >> 20} MiB"
    print(f"{name} ControlNet: {count(net)} parameters; from_unet takes {share}")
    ip = ms.IPAdapter.from_unet(unet, feature_dim=IMAGE_FEATURES[name])
    print(f"{name} IP-Adapter: {count(ip)} parameters")
    with tempfile.TemporaryDirectory() as folder:
        for adapter in (net, ip):
            started = time.perf_counter()
            path = adapter.save_pretrained(Path(folder) / adapter.kind)
            saved = time.perf_counter()
            again = type(adapter).from_pretrained(path)
            equal = all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
            seconds = saved - started, time.perf_counter() - saved
            times = f"saved in {seconds[0]:.1f} s, loaded in {seconds[1]:.1f} s"
            print(f"{name} {adapter.kind}: {times}, equal: {equal}")
            del again
    units = [
        ms.Control(net, torch.rand(1, 3, 64, 64, dtype=dtype)),
        ms.ImagePrompt(ip, features=torch.randn(1, IMAGE_FEATURES[name], dtype=dtype), scale=0.0),
    ]
    with ms.attach(unet, *units):
        print(f"{name}: fresh units change nothing: {torch.equal(unet(**inputs).sample, plain)}")
    torch.nn.init.normal_(net.controlnet_mid_block.weight, std=0.02)
    units[1].scale = 0.5
    with ms.attach(unet, *units):
        changed = unet(**inputs).sample
    print(f"{name}: ran, finite: {bool(changed.isfinite().all())}, changed: {not torch.equal(changed, plain)}")


def count(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


if __name__ == "__main__":
    for chosen in sys.argv[1:] or UNETS:
        check(chosen, torch.float32 if chosen == "sd15" else torch.float16)
