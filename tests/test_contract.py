"""The contract of docs/architecture.md, over every adapter and base family."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters.base import Clock, Window, spread
from mahlstick.adapters.controlnet import gains
from mahlstick.adapters.ip_adapter import cross_attentions
from mahlstick.adapters.projectors import PROJECTORS
from mahlstick.pipelines.attach import clip

HINT = (4, 6, 6, 8)


@dataclass(frozen=True)
class Subject:
    """One kind of adapter, and how a unit of it is made."""

    kind: str
    fresh: Callable[[Any], Any]
    unit: Callable[..., Any]
    neutral: dict[str, Any]  # with which a fresh adapter changes nothing


def control_of(net: Any, batch: int = 1, **options: Any) -> ms.Control:
    torch.manual_seed(9)
    return ms.Control(net, torch.rand(batch, 3, tiny.SIZE, tiny.SIZE), **options)


def features_of(adapter: Any, batch: int) -> Tensor:
    joined = {"concat": (17,), "merger": (17,)}  # so that more than one token comes of it
    inner = {"linear": (), "video": (3, 5), **joined}.get(adapter.config["projector"], (5,))
    return torch.randn(batch, *inner, tiny.WIDTH)


def words_of(adapter: Any) -> Tensor | None:
    adapter.tokenizer = tiny.tokenizer()
    return adapter.words(["a red fox"]) if adapter.reads else None


def image_prompt_of(adapter: Any, batch: int = 1, **options: Any) -> ms.ImagePrompt:
    torch.manual_seed(9)
    adapter.tokenizer = tiny.tokenizer()
    return ms.ImagePrompt(adapter, features=features_of(adapter, batch), prompt="a red fox", **options)


def fresh_ip(projector: str) -> Callable[[Any], ms.IPAdapter]:
    sizes = {"depth": 1, "heads": 2, "head_dim": 8, "frames": 3, "grid": 2, "vocabulary": 515}

    def build(unet: Any) -> ms.IPAdapter:
        return ms.IPAdapter.from_unet(unet, projector, tokens=4, feature_dim=tiny.WIDTH, **sizes)  # type: ignore[arg-type]

    return build


def fresh_net(unet: Any) -> ms.ControlNet:
    return ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=HINT)


def fresh_motion(unet: Any) -> ms.MotionAdapter:
    return ms.MotionAdapter.from_unet(unet, max_frames=8, heads=2)


def motion_of(module: Any, batch: int = 1, **options: Any) -> ms.Motion:
    return ms.Motion(module, **options)


SUBJECTS = [
    Subject("controlnet", fresh_net, control_of, {}),
    *(Subject(p, fresh_ip(p), image_prompt_of, {"scale": 0.0}) for p in PROJECTORS),
    Subject("motion", fresh_motion, motion_of, {}),
]
CASES = [(subject, family) for subject in SUBJECTS for family in tiny.FAMILIES]
contract = pytest.mark.parametrize(("subject", "family"), CASES, ids=[f"{s.kind}-{f}" for s, f in CASES])


def trained(subject: Subject, unet: Any, seed: int = 5) -> Any:
    """An adapter away from its initial values."""
    torch.manual_seed(seed)
    adapter = subject.fresh(unet)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter.requires_grad_(False)


@torch.no_grad()
def eps(unet: Any, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = unet(**inputs).sample
    return result


def fingerprint(unet: Any) -> dict[str, Any]:
    """All that a unit may not leave changed, by identity where there is one."""
    hooks = {
        (name, kind): dict(getattr(module, kind))
        for name, module in unet.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
        if getattr(module, kind)
    }
    return {
        "processors": {name: id(processor) for name, processor in unet.attn_processors.items()},
        "hooks": hooks,
        "keys": list(unet.state_dict()),
        "tensors": {name: id(parameter) for name, parameter in unet.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in unet.named_modules()},
    }


# 1. Fresh, it changes nothing ---------------------------------------------------------------------------------------


@contract
def test_fresh_from_the_unet_it_changes_nothing(subject: Subject, family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    plain = eps(unet, inputs)
    with ms.attach(unet, subject.unit(subject.fresh(unet), **subject.neutral)):
        assert torch.equal(eps(unet, inputs), plain)


@contract
def test_trained_it_changes_something(subject: Subject, family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    plain = eps(unet, inputs)
    with ms.attach(unet, subject.unit(trained(subject, unet))):
        assert (eps(unet, inputs) - plain).abs().max() > 1e-3


# 2. Detached, the UNet is bit-equal to before -----------------------------------------------------------------------


@contract
def test_detached_the_unet_is_what_it_was(subject: Subject, family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    plain, before = eps(unet, inputs), fingerprint(unet)
    adapter = trained(subject, unet)
    attached = ms.attach(unet, subject.unit(adapter))
    assert list(unet.state_dict()) == before["keys"]
    eps(unet, inputs)
    attached.detach()
    attached.detach()
    assert fingerprint(unet) == before
    assert torch.equal(eps(unet, inputs), plain)


@contract
def test_detached_nothing_holds_the_adapter(subject: Subject, family: str) -> None:
    unet = tiny.unet(family)
    adapter = trained(subject, unet)
    with ms.attach(unet, subject.unit(adapter)) as attached:
        eps(unet, tiny.unet_inputs(family))
    held = weakref.ref(adapter)
    del adapter, attached
    gc.collect()
    assert held() is None


def test_an_error_in_the_with_block_detaches() -> None:
    unet = tiny.unet("sd1")
    before = fingerprint(unet)
    with pytest.raises(RuntimeError, match="mine"), ms.attach(unet, control_of(fresh_net(unet))):
        raise RuntimeError("mine")
    assert fingerprint(unet) == before


# 3. Any order of detaching ------------------------------------------------------------------------------------------


def test_a_thousand_random_sequences_end_bit_equal() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    kinds = ("controlnet", "linear", "resampler", "mlp", "video", "motion")  # other projectors are attached as these
    subjects = [subject for subject in SUBJECTS if subject.kind in kinds]
    for family in tiny.FAMILIES:
        unet, inputs = tiny.unet(family), tiny.unet_inputs(family, batch=1)
        plain, before = eps(unet, inputs), fingerprint(unet)
        units = [subject.unit(trained(subject, unet, seed)) for seed in (5, 6) for subject in subjects]
        for sequence in range(334):
            live: list[Any] = []
            for _ in range(1 + draw(6)):
                if live and draw(2):
                    live.pop(draw(len(live))).detach()
                else:
                    live.append(ms.attach(unet, *[units[draw(len(units))] for _ in range(1 + draw(2))]))
            if sequence % 40 == 0:
                eps(unet, inputs)
            while live:
                live.pop(draw(len(live))).detach()
            if sequence % 10 == 0:  # what one left behind would still be there
                assert fingerprint(unet) == before
            if sequence % 40 == 0:
                assert torch.equal(eps(unet, inputs), plain)
        assert fingerprint(unet) == before
        assert torch.equal(eps(unet, inputs), plain)


# 4. A failed attach changes nothing ---------------------------------------------------------------------------------


@contract
def test_a_failed_attach_changes_nothing(subject: Subject, family: str) -> None:
    unet, other = tiny.unet(family), tiny.unet("sd1" if family == "sdxl" else "sdxl")
    before = fingerprint(unet)
    good, bad = subject.unit(trained(subject, unet)), subject.unit(trained(subject, other))
    with pytest.raises(ms.MahlstickError, match="made for"):
        ms.attach(unet, good, bad)
    assert fingerprint(unet) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale"),
        ({"scale": 1e9}, "scale"),
        ({"scale": [1.0, 2.0]}, "13 residuals"),
        ({"start": 0.5, "end": 0.5}, "start"),
        ({"start": -1.0}, "start"),
        ({"end": 2.0}, "end"),
        ({"mode": "loud"}, "mode"),
        ({"window": "seconds"}, "window"),
        ({"mask": torch.full((1, 1, 8, 8), 2.0)}, "mask"),
        ({"mask": "no such file.png"}, "no such file.png"),
    ],
)
def test_absurd_doses_are_refused(options: dict[str, Any], message: str) -> None:
    unet = tiny.unet("sd1")
    before = fingerprint(unet)
    with pytest.raises(ms.MahlstickError, match=message):
        ms.attach(unet, control_of(fresh_net(unet), **options))
    assert fingerprint(unet) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("inf")}, "scale"),
        ({"blocks": "colour"}, "blocks"),
        ({"blocks": {"up_blocks.9": 1.0}}, "blocks"),
        ({"images": [], "features": None}, "empty"),
        ({"features": None}, "either"),
        ({"features": torch.zeros(1, 3)}, "features of shape"),
        ({"images": [tiny.picture()], "features": None}, "image encoder"),
    ],
)
def test_absurd_image_prompts_are_refused(options: dict[str, Any], message: str) -> None:
    unet = tiny.unet("sd1")
    before = fingerprint(unet)
    given = {"features": torch.zeros(1, tiny.WIDTH)} | options
    with pytest.raises(ms.MahlstickError, match=message):
        ms.attach(unet, ms.ImagePrompt(fresh_ip("linear")(unet), **given))
    assert fingerprint(unet) == before


def test_what_is_no_unit_or_has_no_unet_is_refused() -> None:
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match="units"):
        ms.attach(unet, fresh_net(unet))  # type: ignore[arg-type]
    with pytest.raises(ms.MahlstickError, match="UNet2DConditionModel"):
        ms.attach(tiny.vae(), control_of(fresh_net(unet)))  # type: ignore[arg-type]


# 5. Save and load ---------------------------------------------------------------------------------------------------


@contract
def test_saved_and_loaded_it_is_the_same(subject: Subject, family: str, tmp_path: Path) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    adapter = trained(subject, unet)
    again = type(adapter).from_pretrained(adapter.save_pretrained(tmp_path / "adapter"))
    assert {**again.config} == {**adapter.config}
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    with ms.attach(unet, subject.unit(adapter)):
        first = eps(unet, inputs)
    with ms.attach(unet, subject.unit(again)):
        # The weights are equal to the bit; where they lie in memory may decide the last bit of a sum.
        assert torch.allclose(eps(unet, inputs), first, atol=1e-6)
    assert type(ms.load_adapter(tmp_path / "adapter")) is type(adapter)


# 6. Gradients exactly where meant -----------------------------------------------------------------------------------


@contract
def test_gradients_reach_the_adapter_and_nothing_else(subject: Subject, family: str) -> None:
    unet = tiny.unet(family).requires_grad_(False)
    adapter = trained(subject, unet).requires_grad_(True)
    inputs = tiny.unet_inputs(family)
    if subject.kind == "controlnet":  # 2 x 2 in the middle: softmax over a single key has no gradient
        inputs["sample"] = torch.randn(2, 4, tiny.SIZE // 4, tiny.SIZE // 4)
        attached = adapter.attach(unet, torch.rand(1, 3, 2 * tiny.SIZE, 2 * tiny.SIZE))
    elif subject.kind == "motion":
        attached = adapter.attach(unet)
    else:
        attached = adapter.attach(unet, adapter.tokens(features_of(adapter, 2), words_of(adapter)))
    with attached:
        for _ in range(2):  # nothing of the first graph may be cached for the second
            adapter.zero_grad()
            loss = unet(**inputs).sample.square().mean()
            loss.backward(retain_graph=subject.kind not in ("controlnet", "motion"))
    missing = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert not missing  # keys' biases do not exist here, so every parameter matters
    assert all(p.grad is None for p in unet.parameters())


# 8. Algebra ---------------------------------------------------------------------------------------------------------


def rows(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a UNet call's batch."""
    one = {name: value[row : row + 1] if getattr(value, "ndim", 0) else value for name, value in inputs.items()}
    if "added_cond_kwargs" in inputs:
        one["added_cond_kwargs"] = {k: v[row : row + 1] for k, v in inputs["added_cond_kwargs"].items()}
    return one


@contract
def test_a_batch_item_equals_its_solo_run(subject: Subject, family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family, batch=3)
    adapter = trained(subject, unet)
    unit = subject.unit(adapter, 3)
    if subject.kind == "motion":  # of a clip of one frame
        unit.frames = 1
    with ms.attach(unet, unit):
        together = eps(unet, inputs)
    for row in range(3):
        if subject.kind == "controlnet":
            alone = ms.Control(adapter, unit.image[row : row + 1])
        elif subject.kind == "motion":
            alone = unit
        else:
            alone = ms.ImagePrompt(adapter, features=unit.features[row : row + 1], prompt=unit.prompt)
        with ms.attach(unet, alone):
            assert torch.allclose(eps(unet, rows(inputs, row)), together[row : row + 1], atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_order_of_units_does_not_matter(family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    units = [subject.unit(trained(subject, unet, seed)) for seed in (5, 6) for subject in SUBJECTS[:2]]
    results = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        with ms.attach(unet, *(units[i] for i in order)):
            results.append(eps(unet, inputs))
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert torch.allclose(results[0], results[2], atol=1e-5)


@contract
def test_a_zero_mask_is_no_unit_and_a_full_one_no_mask(subject: Subject, family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    adapter, plain = trained(subject, unet), eps(unet, inputs)
    with ms.attach(unet, subject.unit(adapter, mask=torch.zeros(1, 1, tiny.SIZE, tiny.SIZE))):
        assert torch.equal(eps(unet, inputs), plain)
    with ms.attach(unet, subject.unit(adapter)):
        unmasked = eps(unet, inputs)
    with ms.attach(unet, subject.unit(adapter, mask=torch.ones(1, 1, tiny.SIZE, tiny.SIZE))):
        assert torch.allclose(eps(unet, inputs), unmasked, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_complementary_masks_add_up_in_the_layer(family: str) -> None:
    """Of ControlNet's residuals, which enter the UNet by a sum, at every skip connection."""
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    adapter = trained(SUBJECTS[0], unet)
    mask = torch.rand(1, 1, tiny.SIZE, tiny.SIZE)
    seen: list[Any] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((*kwargs["down_block_additional_residuals"], kwargs["mid_block_additional_residual"]))

    for units in ([control_of(adapter)], [control_of(adapter, mask=mask), control_of(adapter, mask=1 - mask)]):
        with ms.attach(unet, *units):
            handle = unet.register_forward_pre_hook(keep, with_kwargs=True)
            eps(unet, inputs)
            handle.remove()
    assert len(seen[0]) == (13 if family != "sdxl" else 10)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*seen, strict=True))


def test_complementary_masks_add_up_in_the_attention() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    adapter = trained(SUBJECTS[1], unet)
    mask = torch.zeros(1, 1, tiny.SIZE, tiny.SIZE)
    mask[..., : tiny.SIZE // 4] = 1
    name, attn = next(cross_attentions(unet))
    seen: list[Tensor] = []
    whole = [image_prompt_of(adapter, blocks={name: 1.0})]
    parts = [image_prompt_of(adapter, blocks={name: 1.0}, mask=m) for m in (mask, 1 - mask)]
    for units in (whole, parts):
        with ms.attach(unet, *units):
            handle = attn.to_out[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            eps(unet, inputs)
            handle.remove()
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


def test_one_scale_for_each_residual() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    adapter = trained(SUBJECTS[0], unet)
    with ms.attach(unet, control_of(adapter, scale=0.5)):
        half = eps(unet, inputs)
    with ms.attach(unet, control_of(adapter, scale=[0.5] * 13)):
        assert torch.equal(eps(unet, inputs), half)
    with ms.attach(unet, control_of(adapter, scale=[0.5] * 12 + [0.0])):
        assert not torch.equal(eps(unet, inputs), half)


def test_the_modes_weights() -> None:
    assert gains(2.0, "balanced", 3) == [2.0, 2.0, 2.0]
    assert gains(1.0, "prompt", 13) == [0.825 ** (12 - i) for i in range(13)]
    assert gains(1.0, "control", 13) == gains(1.0, "prompt", 13)
    guess = gains(1.0, "guess", 13)
    assert guess[0] == pytest.approx(0.1)
    assert guess[12] == 1.0
    assert guess[6] == pytest.approx(10**-0.5)


@pytest.mark.parametrize("mode", ["control", "guess"])
def test_the_conditional_modes_leave_the_unconditional_half(mode: Any) -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=2)
    plain = eps(unet, inputs)
    with ms.attach(unet, control_of(trained(SUBJECTS[0], unet), mode=mode), guidance=True):
        found = eps(unet, inputs)
    assert torch.allclose(found[:1], plain[:1], atol=1e-6)
    assert (found[1:] - plain[1:]).abs().max() > 1e-3


def test_under_guidance_the_unconditional_half_sees_no_picture() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=2)
    adapter = trained(SUBJECTS[1], unet)
    features = torch.randn(1, tiny.WIDTH)
    with ms.attach(unet, ms.ImagePrompt(adapter, features=features), guidance=True):
        both = eps(unet, inputs)
    with ms.attach(unet, ms.ImagePrompt(adapter, features=torch.zeros_like(features))):
        nothing = eps(unet, inputs)
    with ms.attach(unet, ms.ImagePrompt(adapter, features=features)):
        prompted = eps(unet, inputs)
    assert torch.allclose(both[0], nothing[0], atol=1e-6)
    assert torch.allclose(both[1], prompted[1], atol=1e-6)
    assert not torch.allclose(both[1], nothing[1], atol=1e-4)


def test_negative_features_take_the_place_of_no_picture() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=2)
    adapter = trained(SUBJECTS[1], unet)
    features, negative = torch.randn(1, tiny.WIDTH), torch.randn(1, tiny.WIDTH)
    unit = ms.ImagePrompt(adapter, features=features, negative_features=negative)
    with ms.attach(unet, unit, guidance=True):
        both = eps(unet, inputs)
    with ms.attach(unet, ms.ImagePrompt(adapter, features=negative)):
        assert torch.allclose(both[0], eps(unet, inputs)[0], atol=1e-6)


# 9. Inactive costs nothing ------------------------------------------------------------------------------------------


class Count:
    """Forward calls of an adapter's modules that hold weights."""

    def __init__(self, adapter: Any) -> None:
        self.calls = 0
        for module in adapter.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@contract
def test_scale_zero_costs_no_forward(subject: Subject, family: str) -> None:
    unet = tiny.unet(family)
    adapter = trained(subject, unet)
    with ms.attach(unet, subject.unit(adapter, scale=0.0)):
        count = Count(adapter)
        eps(unet, tiny.unet_inputs(family))
    assert count.calls == 0


def test_outside_its_window_a_unit_costs_no_forward() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    net, ip = trained(SUBJECTS[0], unet), trained(SUBJECTS[1], unet)
    plain = eps(unet, inputs)
    early: dict[str, Any] = {"end": 0.4, "window": "noise"}  # timestep 401 of 1000 is 0.6 of the way
    late: dict[str, Any] = {"start": 0.4, "window": "noise"}
    with ms.attach(unet, control_of(net, **early), image_prompt_of(ip, **early)):
        counts = Count(net), Count(ip)
        assert torch.equal(eps(unet, inputs), plain)
    assert [count.calls for count in counts] == [0, 0]
    with ms.attach(unet, control_of(net, **late), image_prompt_of(ip, **late)):
        assert not torch.equal(eps(unet, inputs), plain)


def test_hint_and_tokens_are_computed_once() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    net, ip = trained(SUBJECTS[0], unet), trained(SUBJECTS[1], unet)
    hints, keys = Count(net.controlnet_cond_embedding), Count(ip)
    with ms.attach(unet, control_of(net), image_prompt_of(ip)):
        eps(unet, inputs)
        once = hints.calls, keys.calls
        for _ in range(4):
            eps(unet, inputs)
    assert (hints.calls, keys.calls) == once
    assert once[0] == sum(1 for m in net.controlnet_cond_embedding.modules() if isinstance(m, torch.nn.Conv2d))


def test_a_window_in_steps_needs_a_pipeline() -> None:
    unet = tiny.unet("sd1")
    with ms.attach(unet, control_of(fresh_net(unet), start=0.5)), pytest.raises(ms.MahlstickError, match="pipeline"):
        eps(unet, tiny.unet_inputs("sd1"))


# Conditions ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([("cond",), ("uncond", "cond"), ("uncond", "cond", "cond")])
)
@settings(deadline=None, max_examples=30)
def test_every_picture_of_the_batch_gets_its_condition(n: int, each: int, parts: tuple[str, ...]) -> None:
    conditions = torch.arange(n, dtype=torch.float32)[:, None]
    found = spread(conditions, n * each * len(parts), parts).flatten().tolist()
    assert found == [float(i) for i in range(n) for _ in range(each)] * len(parts)


def test_conditions_that_do_not_fit_the_batch_are_refused() -> None:
    with pytest.raises(ms.MahlstickError, match="3 conditions"):
        spread(torch.zeros(3, 1), 4, ("uncond", "cond"))
    with pytest.raises(ms.MahlstickError, match="2 conditions"):
        spread(torch.zeros(2, 1), 4, None)


def test_a_control_tensor_of_the_wrong_size_is_refused() -> None:
    unet = tiny.unet("sd1")
    unit = ms.Control(fresh_net(unet), torch.rand(1, 3, 40, 40))
    with ms.attach(unet, unit), pytest.raises(ms.MahlstickError, match=r"\(n, 3, 64, 64\)"):
        eps(unet, tiny.unet_inputs("sd1"))


@pytest.mark.parametrize("form", ["pil", "numpy", "float", "path", "list"])
def test_control_pictures_in_every_form(form: str, tmp_path: Path) -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    net, picture = trained(SUBJECTS[0], unet), tiny.picture(3)
    import numpy as np

    array = np.array(picture)
    picture.save(tmp_path / "a.png")
    forms = {
        "pil": picture,
        "numpy": array,
        "float": array.astype(np.float32) / 255,
        "path": tmp_path / "a.png",
        "list": [picture, picture],
    }
    with ms.attach(unet, ms.Control(net, torch.from_numpy(array).permute(2, 0, 1)[None] / 255)):
        wanted = eps(unet, inputs)
    with ms.attach(unet, ms.Control(net, forms[form])):
        assert torch.allclose(eps(unet, inputs), wanted, atol=1e-5)


def test_a_stretched_control_picture_warns() -> None:
    unet = tiny.unet("sd1")
    wide = tiny.picture(3).resize((128, 64))
    with ms.attach(unet, ms.Control(fresh_net(unet), wide)), pytest.warns(UserWarning, match="stretched"):
        eps(unet, tiny.unet_inputs("sd1"))


def test_references_for_each_picture_of_the_batch() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=2)
    ip = trained(SUBJECTS[1], unet)
    ip.use_encoder(tiny.image_encoder(), tiny.feature_extractor())
    a, b = tiny.picture(1), tiny.picture(2)

    def run(images: Any, batch: dict[str, Any] = inputs) -> Tensor:
        with ms.attach(unet, ms.ImagePrompt(ip, images)):
            return eps(unet, batch)

    each = run([a, b])
    for row, picture in enumerate((a, b)):
        assert torch.allclose(each[row : row + 1], run([picture], rows(inputs, row)), atol=1e-5)
    assert torch.allclose(run([[a], [b]], {**inputs}), each, atol=1e-6)
    both = run([[a, b]])
    assert torch.allclose(both, run([[a, b], [a, b]]), atol=1e-6)
    assert not torch.allclose(both, each, atol=1e-4)
    with pytest.raises(ms.MahlstickError, match="same number"):
        run([[a, b], [a]])


def test_a_reference_that_is_not_square_keeps_what_was_said() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    ip = trained(SUBJECTS[1], unet)
    ip.use_encoder(tiny.image_encoder(), tiny.feature_extractor())
    wide = tiny.picture(1).resize((64, 32))  # as high as the encoder sees, so that nothing is resampled

    def run(picture: Any, **options: Any) -> Tensor:
        with ms.attach(unet, ms.ImagePrompt(ip, [picture], **options)):
            return eps(unet, inputs)

    assert torch.allclose(run(wide), run(wide.crop((16, 0, 48, 32))), atol=1e-5)
    assert torch.allclose(run(wide, resize="stretch"), run(wide.resize((64, 64), 1)), atol=1e-5)
    assert not torch.allclose(run(wide, resize="pad"), run(wide), atol=1e-4)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_window_is_a_window(start: float, end: float) -> None:
    if start < end:
        assert Window(start, end).whole == (start == 0 and end == 1)
    else:
        with pytest.raises(ms.MahlstickError):
            Window(start, end)


# What a reviewer found ----------------------------------------------------------------------------------------------


def test_two_conditions_for_one_guided_picture_are_refused() -> None:
    with pytest.raises(ms.MahlstickError, match="2 conditions"):
        spread(torch.zeros(2, 1), 2, ("uncond", "cond"))


def test_a_mask_for_each_picture_follows_the_parts_of_the_batch() -> None:
    """The same batch size with and without guidance: masks of one must not serve the other."""
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=4)
    masks = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    for subject in SUBJECTS[:2]:
        adapter = trained(subject, unet)
        clock = Clock(("uncond", "cond"))
        (attachment,) = clip(unet, [subject.unit(adapter, mask=masks)], clock).attachments
        eps(unet, inputs)
        clock._parts = ("cond",)
        found = eps(unet, inputs)
        attachment.detach()
        (attachment,) = clip(unet, [subject.unit(adapter, mask=masks)], Clock(("cond",))).attachments
        assert torch.equal(eps(unet, inputs), found)
        attachment.detach()


def test_a_list_of_tensors_is_used_as_it_is() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    net = trained(SUBJECTS[0], unet)
    picture = torch.rand(1, 3, tiny.SIZE, tiny.SIZE)
    picture[..., :10, :] = -1.0  # as inpainting nets are told what to repaint
    with ms.attach(unet, ms.Control(net, picture)):
        wanted = eps(unet, inputs)
    with ms.attach(unet, ms.Control(net, [picture])):
        assert torch.equal(eps(unet, inputs), wanted)


def test_a_call_of_the_unconditional_half_alone_costs_a_conditional_unit_no_forward() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    net, plain = trained(SUBJECTS[0], unet), eps(unet, inputs)
    with clip(unet, [control_of(net, mode="guess")], Clock(("uncond",))):
        count = Count(net)
        assert torch.equal(eps(unet, inputs), plain)
    assert count.calls == 0


def test_a_batch_without_equal_parts_is_refused() -> None:
    unet = tiny.unet("sd1")
    with ms.attach(unet, control_of(fresh_net(unet)), guidance=True):
        with pytest.raises(ms.MahlstickError, match="a batch of 3"):
            eps(unet, tiny.unet_inputs("sd1", batch=3))


def test_later_hooks_see_the_arguments_where_they_were() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    seen: list[int] = []
    with ms.attach(unet, control_of(trained(SUBJECTS[0], unet))), torch.no_grad():
        handle = unet.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
        by_position = unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample
        handle.remove()
        assert torch.equal(eps(unet, inputs), by_position)
    assert seen == [3]


def test_a_copy_of_a_unet_with_a_lora_is_refused() -> None:
    from peft import LoraConfig

    unet = tiny.unet("sd1")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ms.MahlstickError, match="LoRA"):
        fresh_net(unet)


def test_heads_under_either_name() -> None:
    net = fresh_net(tiny.unet("sd1"))
    config = {**net.config, "num_attention_heads": net.config["attention_head_dim"], "attention_head_dim": 8}
    assert ms.ControlNet(config).down_blocks[0].attentions[0].num_attention_heads == 2


@pytest.mark.parametrize("scale", ["abc", None, [1.0, "x"], [float("nan")] * 13])
def test_a_scale_that_is_no_number_is_refused(scale: Any) -> None:
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match="scale"):
        ms.attach(unet, control_of(fresh_net(unet), scale=scale))


def test_scales_as_an_array() -> None:
    import numpy as np

    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    net = trained(SUBJECTS[0], unet)
    with ms.attach(unet, control_of(net)):
        wanted = eps(unet, inputs)
    with ms.attach(unet, control_of(net, scale=np.ones(13))):
        assert torch.equal(eps(unet, inputs), wanted)


@pytest.mark.parametrize(
    "blocks", [["style"], {"mid_block": float("nan")}, {"mid_block": 1.0, "up_blokcs.1": 1.0}, {"up_blocks.": 1.0}]
)
def test_blocks_that_name_nothing_are_refused(blocks: Any) -> None:
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match="blocks"):
        ms.attach(unet, image_prompt_of(fresh_ip("linear")(unet), blocks=blocks))


def test_style_is_in_the_layers_that_ipadapter_plus_names() -> None:
    """Its weights go by the order in which layers run: numbers 0 to 3 and 9 to 15 of Stable Diffusion 1.5's 16."""
    unet = tiny.unet("sd1")
    adapter = trained(SUBJECTS[1], unet)
    names = sorted((name for name, _ in cross_attentions(unet)), key=lambda name: ("dmu".index(name[0]), name))
    named = {name: 1.0 for i, name in enumerate(names) if i < 4 or i > 8}
    assert len(names) == 16
    found = []
    for blocks in ("style", named):
        with ms.attach(unet, image_prompt_of(adapter, blocks=blocks)):
            found.append(eps(unet, tiny.unet_inputs("sd1")))
    assert torch.equal(*found)


def test_at_scale_zero_no_picture_is_encoded() -> None:
    unet = tiny.unet("sd1")
    adapter = trained(SUBJECTS[1], unet)
    encoder = tiny.image_encoder()
    adapter.use_encoder(encoder, tiny.feature_extractor())
    calls: list[int] = []
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    with ms.attach(unet, ms.ImagePrompt(adapter, [tiny.picture()], scale=0.0)):
        eps(unet, tiny.unet_inputs("sd1"))
    assert not calls
    with ms.attach(unet, ms.ImagePrompt(adapter, [tiny.picture()])):
        assert calls
    handle.remove()


def test_an_unknown_resize_mode_is_refused_at_attach() -> None:
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match="resize"):
        ms.attach(unet, ms.Control(fresh_net(unet), tiny.picture(), resize="squash"))  # type: ignore[arg-type]
