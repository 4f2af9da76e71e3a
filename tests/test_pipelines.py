"""Units on every pipeline of diffusers that docs/pipelines.md calls tested, on tiny random models."""

from __future__ import annotations

import numpy as np
import pytest

import mahlstick as ms
from benchmarks.catalogue import NOT_APPLICABLE, PAGE, applicable, owners, render
from tests import zoo


@pytest.mark.parametrize("name", zoo.CASES)
def test_units_change_the_picture_and_leave_no_trace(name: str) -> None:
    pipe = zoo.build(name)
    before = zoo.generate(pipe, name)
    assert np.isfinite(before).all()
    with ms.attach(pipe, zoo.control(pipe.unet)):
        controlled = zoo.generate(pipe, name)
        with ms.attach(pipe, zoo.image_prompt(pipe.unet)):
            both = zoo.generate(pipe, name)
    assert np.isfinite(both).all()
    assert not np.array_equal(before, controlled)
    assert not np.array_equal(controlled, both)
    assert np.array_equal(before, zoo.generate(pipe, name))


def test_every_pipeline_has_its_verdict() -> None:
    assert {name.split()[0] for name in zoo.CASES} == set(applicable())
    assert set(NOT_APPLICABLE) <= set(owners())


def test_the_page_is_what_the_catalogue_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == render()
