"""Muon against torch's own on matrices, and against AdamW on what is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mahlstick.training.muon import Muon, orthogonalised

SETTINGS = {"rate": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1}


class Net(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 40)
        self.linear = nn.Linear(48, 64)
        self.wide = nn.Linear(96, 40, bias=False)
        self.conv = nn.Conv2d(40, 36, 3)
        self.narrow = nn.Linear(64, 4)


def learn(net: Net, optimiser: torch.optim.Optimizer, first: int = 0, steps: int = 3) -> dict[str, Tensor]:
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=random)
        optimiser.step()
        optimiser.zero_grad()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_singular_values_come_near_one_and_directions_stay() -> None:
    x = torch.randn(3, 40, 90, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(orthogonalised(x).float(), full_matrices=False)
    assert 0.6 < s.min() and s.max() < 1.3
    p, _, qh = torch.linalg.svd(x, full_matrices=False)
    # u and vh turn within near-equal singular values, their product does not
    torch.testing.assert_close(u @ vh, p @ qh, atol=0.03, rtol=0)


def test_matrices_take_the_steps_of_torchs_muon() -> None:
    net, other = Net(), Net()
    ours = learn(net, Muon(net, **SETTINGS))
    views = {
        name: nn.Parameter(p.detach().flatten(1).clone())
        for name, p in other.named_parameters()
        if name in ("linear.weight", "wide.weight", "conv.weight")
    }
    theirs = torch.optim.Muon(views.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for name, p in other.named_parameters():
            gradient = torch.randn(p.shape, generator=random)
            if name in views:
                views[name].grad = gradient.flatten(1)
        theirs.step()
    begun = dict(Net().named_parameters())
    for name, value in views.items():
        moved = (value - begun[name].flatten(1)).norm()
        assert (ours[name].flatten(1) - value).norm() < 0.05 * moved  # bfloat16 inside, in another order


def test_what_is_no_matrix_takes_the_steps_of_adamw() -> None:
    net, other = Net(), Net()
    ours = learn(net, Muon(net, **SETTINGS))
    theirs = learn(other, torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1))
    plain = learn(copied := Net(), torch.optim.AdamW(copied.parameters(), lr=1e-2, weight_decay=0.0))
    for name in ("table.weight", "narrow.weight"):
        assert torch.equal(ours[name], theirs[name])
    for name in ("linear.bias", "conv.bias", "narrow.bias"):
        assert torch.equal(ours[name], plain[name])


def test_it_goes_on_from_its_state_with_the_same_bits() -> None:
    net = Net()
    optimiser = Muon(net, **SETTINGS)
    learn(net, optimiser, steps=2)
    other = copy.deepcopy(net)
    again = Muon(other, **SETTINGS)
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    on, from_state = learn(net, optimiser, first=2), learn(other, again, first=2)
    assert all(torch.equal(on[name], from_state[name]) for name in on)


def test_what_has_no_gradient_stays() -> None:
    net = Net()
    optimiser = Muon(net, **SETTINGS)
    before = net.linear.weight.detach().clone()
    net.wide.weight.grad = torch.ones_like(net.wide.weight)
    optimiser.step()
    assert torch.equal(net.linear.weight, before)


@pytest.mark.parametrize("shape", [(33, 200), (200, 33)])
def test_a_step_is_as_long_either_way_round(shape: tuple[int, int]) -> None:
    net = nn.Linear(*shape, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(0))
    Muon(net, 1e-2, (0.9, 0.999), 0.0).step()
    step = (net.weight.detach() - before).square().mean().sqrt()
    assert 0.6 * 0.2e-2 < float(step) < 1.3 * 0.2e-2


def test_processes_share_no_work_where_there_is_no_matrix() -> None:
    """Such as in a LoRA, whose matrices are all narrow."""
    net = nn.Linear(64, 4)
    optimiser = Muon(net, **SETTINGS)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        net.weight.grad = torch.ones_like(net.weight)
        before = net.weight.detach().clone()
        optimiser.step()
    finally:
        torch.distributed.destroy_process_group()
    assert not torch.equal(net.weight, before)
