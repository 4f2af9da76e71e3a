"""What the page offers is all that it reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mahlstick.errors import MahlstickError
from mahlstick.page.models import Models
from mahlstick.pipelines.request import Request

PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("base_config", {"base_config": "/etc"}),
        ("controls", {"controls": [{"adapter": "/etc/net.safetensors", "image": PICTURE}]}),
        (
            "controls[0].options.model",
            {
                "controls": [
                    {"adapter": "lineart", "image": PICTURE, "annotator": "depth", "options": {"model": "/etc"}}
                ]
            },
        ),
        ("image_prompts[0].image_encoder", {"image_prompts": [{"images": [PICTURE], "image_encoder": "/etc"}]}),
        ("image_prompts[0].search", {"image_prompts": [{"search": "fox", "library": "/etc/library.sqlite"}]}),
        ("image_prompts[0].search", {"image_prompts": [{"search": "fox"}]}),
    ],
)
def test_a_request_from_outside_names_no_file_of_the_server(field: str, fields: dict[str, Any]) -> None:
    request = Request(prompt="fox", **fields)
    with pytest.raises(MahlstickError, match=f"^{re.escape(field)}: .* is not offered on this page"):
        Models(None).check(request)
    with pytest.raises(MahlstickError, match=f"^{re.escape(field)}: .* is not offered on this page"):
        Models(None, library=Path("/library.sqlite")).check(request)
