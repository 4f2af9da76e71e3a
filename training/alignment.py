"""What a Q-Former learns first: to tell pictures and words apart (ITC), to match them (ITM) and to put a picture into
words (ITG), after BLIP-2 (arXiv 2301.12597, section 3.1). Hard negatives and soft targets are ALBEF's (2107.07651)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SOFT = 0.4  # α, the share of the momentum model in the targets (ALBEF, section 3.3)


def same_words(words: Tensor, others: Tensor) -> Tensor:
    """Whether texts ``(B, length)`` and ``(N, length)`` are the same, ``(B, N)``: those are no negatives."""
    return (words[:, None] == others[None]).all(dim=-1)


def targets(own: Tensor, momentum: Tensor | None = None) -> Tensor:
    """Of each row's similarities, ``(B, N)``: all on what is its own, evenly; of it α is what the momentum model's
    similarities say (ALBEF, equation 6)."""
    hard = own.float() / own.sum(dim=1, keepdim=True)
    return hard if momentum is None else SOFT * momentum.softmax(dim=1) + (1 - SOFT) * hard


def contrast(by_image: Tensor, by_text: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
    """ITC ``(B,)``: InfoNCE of the similarities ``(B, N)`` to all texts and to all pictures, over the temperature."""
    pictures, texts = wanted
    losses = F.cross_entropy(by_image, pictures, reduction="none"), F.cross_entropy(by_text, texts, reduction="none")
    return (losses[0] + losses[1]) / 2


def hard_negatives(likeness: Tensor, own: Tensor, lots: Tensor) -> tuple[Tensor, Tensor]:
    """For each row one of the others ``(B,)``, drawn by lots in [0, 1) with the softmax of the likeness ``(B, N)`` for
    probabilities, and whether there is one (ALBEF, section 3.2)."""
    odds = likeness.softmax(dim=1).masked_fill(own, 0).double()
    below = odds.cumsum(dim=1)
    chosen = (below <= lots[:, None].double() * below[:, -1:]).sum(dim=1).clamp(max=odds.shape[1] - 1)
    return chosen, ~own.all(dim=1)


def wording(logits: Tensor, words: Tensor, momentum: Tensor | None = None) -> Tensor:
    """ITG ``(B,)``: the mean over a text's words of the cross entropy of each given those before, of which α is against
    the momentum model's logits (ALBEF, equation 7). ``logits`` ``(B, length, vocabulary)`` of the word behind each."""
    said, found = words[:, 1:], logits[:, :-1].log_softmax(dim=-1)
    losses = -found.gather(2, said.clamp(min=0)[..., None])[..., 0]
    if momentum is not None:
        soft = -(momentum[:, :-1].softmax(dim=-1) * found).sum(dim=-1)
        losses = SOFT * soft + (1 - SOFT) * losses
    there = said >= 0
    return (losses * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
