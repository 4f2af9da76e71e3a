"""A request as a Python script, as a command line and as a workflow."""

from __future__ import annotations

import json
import pprint
import shlex
from typing import Any

from mahlstick.nodes.comfy.request import from_request
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request, Spec

# field of a request -> option of `mahlstick generate`
_SAME = ("prompt", "base", "seed", "steps", "guidance", "scheduler", "images", "init", "strength", "mask")
_OPTIONS = {name: f"--{name}" for name in _SAME} | {"negative_prompt": "--negative"}


def python(request: Request) -> str:
    """A script that makes the request's pictures. Pictures in it are paths."""
    lines = [f"    {name}={_literal(value)}," for name, value in _given(request).items()]
    return "\n".join(
        ["import mahlstick as ms", "", "request = ms.Request(", *lines, ")", 'ms.generate(request).save("out")']
    )


def _literal(value: Any) -> str:
    return pprint.pformat(value, width=100, sort_dicts=False).replace("\n", "\n    ")


def _given(spec: Spec) -> dict[str, Any]:
    """What differs from the defaults."""
    return spec.model_dump(mode="json", exclude_defaults=True)


def command(request: Request) -> str | None:
    """The line for a shell; None where something has no option and a request file is needed."""
    given = _given(request)
    units = [_control(spec) for spec in request.controls] + [_image_prompt(spec) for spec in request.image_prompts]
    size = [f"--size {request.width}x{request.height}"] if request.width else []
    rest = {
        name: value for name, value in given.items() if name not in ("controls", "image_prompts", "width", "height")
    }
    if None in units or not rest.keys() <= _OPTIONS.keys():
        return None
    plain = [f"{_OPTIONS[name]} {shlex.quote(str(value))}" for name, value in rest.items()]
    return " ".join(["mahlstick generate", *plain, *size, *(unit or "" for unit in units), "--out out"])


def workflow(request: Request) -> tuple[str, list[str]]:
    """ComfyUI's API JSON, and what it does not say. Pictures of the request are paths."""
    api, left_out = from_request(request)
    return json.dumps(api, indent=2, ensure_ascii=False), left_out


def _control(spec: ControlSpec) -> str | None:
    given = _given(spec)
    if not given.keys() <= {"adapter", "image", "annotator", "scale"} or isinstance(spec.scale, list):
        return None
    net = f"{spec.adapter}@{spec.annotator}" if spec.annotator else spec.adapter
    return f"--control {shlex.quote(f'{net}={spec.image}:{spec.scale:g}')}"


def _image_prompt(spec: ImagePromptSpec) -> str | None:
    given = _given(spec)
    if not given.keys() <= {"adapter", "images", "scale"} or len(spec.images) != 1:
        return None
    adapter = f"{spec.adapter}=" if "adapter" in given else ""
    return f"--image-prompt {shlex.quote(f'{adapter}{spec.images[0]}:{spec.scale:g}')}"
