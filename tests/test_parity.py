"""Every comparison of docs/fidelity.md stays inside its bound."""

from __future__ import annotations

import pytest

from benchmarks.fidelity import GOLDENS, Case, cases

ALL = list(cases())


@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_equals_the_reference(case: Case) -> None:
    found, effect = case.measure()
    assert found <= case.bound
    assert effect > 1000 * found  # the unit did something


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the originals' outputs are not beside this checkout")
def test_the_original_programs_are_among_the_cases() -> None:
    assert sum(case.reference != "diffusers" for case in ALL) == 11
