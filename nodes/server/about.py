"""What a server says of itself: the machine, the models, a page for people."""

from __future__ import annotations

import sys
from pathlib import PurePosixPath
from typing import Any

import psutil
import torch
from torch import cuda

import mahlstick
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>mahlstick</title>
<meta name="viewport" content="width=device-width">
<style>body {{ font: 16px/1.5 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em }}</style>
<h1>mahlstick {version}</h1>
<p>This server runs ComfyUI's workflows on diffusers. It knows {nodes} kinds of nodes. It has no page to draw workflows
on: programs send them, over ComfyUI's protocol. Any client for ComfyUI will do; give it the address of this page.</p>
<p>To look around: <a href="queue">what runs and waits</a>, <a href="history?max_items=20">what became of it</a>,
<a href="object_info">the nodes</a>, <a href="models">the kinds of models</a>, <a href="system_stats">this machine</a>.
</p>
</html>
"""


def page(nodes: int) -> str:
    return _PAGE.format(version=mahlstick.__version__, nodes=nodes)


def system() -> dict[str, Any]:
    """ComfyUI's ``/system_stats``; memory in bytes. mahlstick's version stands for ComfyUI's."""
    memory = psutil.virtual_memory()
    return {
        "system": {
            "os": sys.platform,
            "ram_total": memory.total,
            "ram_free": memory.available,
            "comfyui_version": mahlstick.__version__,
            "mahlstick_version": mahlstick.__version__,
            "python_version": sys.version,
            "pytorch_version": torch.__version__,
            "embedded_python": False,
            "argv": sys.argv[:1],
        },
        "devices": _gpus() or [_cpu(memory)],
    }


def _gpus() -> list[dict[str, Any]]:
    return [_gpu(index) for index in range(cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    free, total = cuda.mem_get_info(index)
    reserved = cuda.memory_reserved(index)
    idle = reserved - cuda.memory_allocated(index)
    return {
        "name": f"cuda:{index} {cuda.get_device_name(index)}",
        "type": "cuda",
        "index": index,
        "vram_total": total,
        "vram_free": free + idle,
        "torch_vram_total": reserved,
        "torch_vram_free": idle,
    }


def _cpu(memory: Any) -> dict[str, Any]:
    size = {"vram_total": memory.total, "vram_free": memory.available}
    torch_size = {"torch_vram_total": memory.total, "torch_vram_free": memory.available}
    return {"name": "cpu", "type": "cpu", "index": None} | size | torch_size


def embeddings() -> list[str]:
    """Their names as they stand in a text, without an ending."""
    return [str(PurePosixPath(name).with_suffix("")) for name in folders.listed("embeddings")]


def metadata(kind: str, name: str) -> dict[str, str]:
    """What a .safetensors file says of itself; nothing where there is no such file. Reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        path = folders.find(kind, name)
        with safe_open(path, "np") as opened:
            return opened.metadata() or {}
    except (MahlstickError, SafetensorError, OSError):
        return {}
