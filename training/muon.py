"""Muon: steps whose singular values are all alike, so that rare directions are learned as fast as common ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BETA = 0.95  # of the momentum
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # a, b, c of a step X ← aX + (bA + cA²)X with A = XXᵀ (Jordan et al.)
ITERATIONS = 5
RMS = 0.2  # of AdamW's usual update
NARROW = 32  # a matrix with a shorter side is AdamW's


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, *Muon: An optimizer for hidden layers in neural networks*) on the matrices of a module,
    kernels of convolutions among them as (out, in · height · width); AdamW on embeddings, narrow matrices and vectors.

    A matrix (r, c) takes rate · 0.2 √max(r, c) · orthogonalised Nesterov momentum, a step as long as AdamW's, so that
    the same rates do (Liu et al. 2025, 2502.16982, equation 4). Processes that train together share the work of
    orthogonalising.
    """

    def __init__(self, module: nn.Module, rate: float, betas: tuple[float, float], weight_decay: float) -> None:
        matrices, others, vectors = sorted_out(module)
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=rate, betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step. The matrices' gradients are gone after it, which is how AdamW knows that they are not its own."""
        group = self.param_groups[0]
        matrices = [p for p in group["params"] if p.grad is not None]
        wide = [self._ahead(p) for p in matrices]
        for p, turned in zip(matrices, orthogonalised_together(wide), strict=True):
            length = RMS * max(turned.shape) ** 0.5
            update = turned if p.flatten(1).shape == turned.shape else turned.T
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * length * update.reshape(p.shape))
            p.grad = None
        return super().step(closure)

    def _ahead(self, p: nn.Parameter) -> Tensor:
        """Nesterov's momentum of a matrix, its longer side last."""
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - BETA)
        found = gradient.lerp(state["momentum"], BETA).flatten(1)
        return found.T if len(found) > found.shape[1] else found


def sorted_out(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """What learns of a module: Muon's matrices, AdamW's, and vectors."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    known = [p for p in module.parameters() if p.requires_grad]
    tall = [p for p in known if p.ndim > 1]
    matrices = [p for p in tall if id(p) not in tables and min(p.flatten(1).shape) >= NARROW]
    own = set(map(id, matrices))
    return matrices, [p for p in tall if id(p) not in own], [p for p in known if p.ndim <= 1]


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices (n, r, c), r ≤ c, with their singular values brought near 1 by Newton–Schulz iterations in bfloat16."""
    a, b, c = COEFFICIENTS
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def orthogonalised_together(wide: Sequence[Tensor]) -> Iterable[Tensor]:
    """Each matrix orthogonalised, those of one shape at once; each process does its share, and all get the whole."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    turned = [torch.zeros_like(x, dtype=torch.bfloat16) for x in wide]

    def shape(i: int) -> tuple[int, ...]:
        return tuple(wide[i].shape)

    for _, alike in groupby(sorted(range(len(wide)), key=shape)[rank::world], key=shape):
        indices = list(alike)
        for i, x in zip(indices, orthogonalised(torch.stack([wide[i] for i in indices])), strict=True):
            turned[i] = x
    if world == 1 or not turned:
        return turned
    flat = torch.cat([x.flatten() for x in turned])
    dist.all_reduce(flat)  # all but one process have zeros
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in turned]), turned, strict=True)]
