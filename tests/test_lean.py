"""What training keeps less of, it computes again to the bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from mahlstick.training import lean
from tests import zoo


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "WORTH_IT", 0)


def leaned(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    lean.make_lean(twin)
    return twin


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return zoo.embeddings(0, 2, 4, 16, 16), torch.tensor([3, 900]), zoo.embeddings(1, 2, 77, zoo.DIM)


def learned(net: Any, autocast: bool) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """The output, every gradient, and the bytes kept for the backward pass."""
    sample, t, text = inputs()
    sample.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = net(sample, t, text).sample
        loss = out.float().square().mean()
    loss.backward()
    return out, {"sample": sample.grad} | {name: p.grad for name, p in net.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_same_bits_from_less_memory(frozen: bool, autocast: bool) -> None:
    unet = zoo.unet().requires_grad_(not frozen)
    twin = leaned(unet)
    (out, grads, kept), (lean_out, lean_grads, lean_kept) = (learned(net, autocast) for net in (unet, twin))
    assert torch.equal(out, lean_out)
    assert grads.keys() == lean_grads.keys()
    for name, grad in grads.items():
        other = lean_grads[name]
        assert (grad is None and other is None) or (grad is not None and torch.equal(grad, other)), name
    assert lean_kept < 0.9 * kept


def test_weights_keep_their_names_and_a_copy_stays_lean() -> None:
    unet = zoo.unet()
    twin = leaned(unet)
    assert list(twin.state_dict()) == list(unet.state_dict())
    assert any(isinstance(m, lean.LeanResnet) for m in copy.deepcopy(twin).modules())
    assert not any(isinstance(m, lean.LeanResnet) for m in unet.modules())


@pytest.mark.parametrize("change", [
    lambda block: setattr(block.dropout, "p", 0.1),
    lambda block: setattr(block, "output_scale_factor", math.sqrt(2)),
    lambda block: setattr(block, "nonlinearity", nn.Mish()),
    lambda block: setattr(block, "conv1", nn.Sequential(block.conv1)),
    lambda block: block.norm2.register_forward_hook(lambda *_: None),
])  # fmt: skip
def test_blocks_that_compute_something_else_are_left_alone(change: Any) -> None:
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=8, groups=4)
    change(block)
    lean.make_lean(block)
    assert type(block) is ResnetBlock2D
