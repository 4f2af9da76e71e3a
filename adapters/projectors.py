"""Projectors: image features into prompt tokens.

Parameter names are those of the published IP-Adapter files, so that a state dict needs no renaming; those of `Video`,
which nobody has published, are ours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mahlstick.adapters import positions
from mahlstick.errors import MahlstickError


class Linear(nn.Module):
    """One linear layer and a norm on the pooled image embedding (IP-Adapter, arXiv 2308.06721, section 3.2.1).

    ``(batch, feature_dim)`` to ``(batch, tokens, dim)``.
    """

    pooled = True
    takes = ("batch",)

    def __init__(self, feature_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(feature_dim, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.proj(features).unflatten(-1, (self.tokens, -1))))


class MLP(nn.Module):
    """Two linear layers with GELU and a norm on every feature token (the published "full" variant).

    ``(batch, length, feature_dim)`` to ``(batch, length, dim)``.
    """

    pooled = False
    takes = ("batch", "length")

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(feature_dim, feature_dim), nn.GELU(), nn.Linear(feature_dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.proj(features))


class PerceiverAttention(nn.Module):
    """Latents attend over features and themselves (Perceiver resampler, Flamingo, arXiv 2204.14198, figure 5)."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        features, latents = self.norm1(features), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        return cast(Tensor, self.to_out(multihead(q, k, v, self.heads)))


class Resampler(nn.Module):
    """Learned latents that read all feature tokens (IP-Adapter Plus).

    ``(batch, length, feature_dim)`` to ``(batch, tokens, dim)``; inside it is heads · head_dim wide.
    """

    pooled = False
    takes = ("batch", "length")

    def __init__(self, feature_dim: int, dim: int, tokens: int, depth: int, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(feature_dim, width)
        self.proj_out = nn.Linear(width, dim)
        self.norm_out = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads, head_dim), _feed_forward(width)]) for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.proj_in(features)
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        return cast(Tensor, self.norm_out(self.proj_out(latents)))


class Video(nn.Module):
    """A clip as one prompt, by InternVideo2's recipe (2403.15377): patches of sparsely sampled frames get positions in
    time, height and width, attend to each other beside a class token, and are pooled by attention.

    ``(batch, frames, length, feature_dim)`` to ``(batch, tokens, dim)``. A frame's features are grid² patches, row by
    row, with or without the encoder's class token in front, which is left out: the clip has a learned one. More frames
    than were trained have their positions interpolated along time.
    """

    pooled = False
    takes = ("batch", "frames", "length")

    def __init__(
        self, feature_dim: int, dim: int, tokens: int, depth: int, heads: int, head_dim: int, frames: int, grid: int
    ) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        width = heads * head_dim
        self.frames, self.grid = frames, grid
        self.proj_in = nn.Linear(feature_dim, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.positions = nn.Parameter(positions.sincos_3d(frames, grid, grid, width)[None])
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, head_dim, activation_fn="gelu") for _ in range(depth)
        )
        self.pool = Resampler(width, dim, tokens, 1, heads, head_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Raises ``MahlstickError`` for frames of another number of patches."""
        batch, frames, length = features.shape[:3]
        patches = self.grid**2
        if length not in (patches, patches + 1):
            raise MahlstickError(
                f"this projector was made for frames of {self.grid} x {self.grid} patches ({patches} features, or one "
                f"more with a class token); got {length}: encode them with the image encoder it was trained with."
            )
        x = self.proj_in(features[:, :, -patches:]).flatten(1, 2)
        x = torch.cat([self.class_token.expand(batch, -1, -1), x], dim=1)
        x = x + positions.extend_3d(self.positions, self.frames, frames)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.pool(x))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


def multihead(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(QKᵀ/√d)V over ``heads`` equal parts of the width; all ``(batch, length, heads · d)``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


Projector = Linear | MLP | Resampler | Video
PROJECTORS = ("linear", "resampler", "mlp", "video")


def build(config: dict[str, Any]) -> Projector:
    """The projector that an IP-Adapter's config names. Raises ``MahlstickError`` for an unknown name."""
    kind, features, dim = config["projector"], config["feature_dim"], config["cross_attention_dim"]
    sizes = ("tokens", "depth", "heads", "head_dim")
    if kind == "linear":
        return Linear(features, dim, config["tokens"])
    if kind == "mlp":
        return MLP(features, dim)
    if kind == "resampler":
        return Resampler(features, dim, *(config[name] for name in sizes))
    if kind == "video":
        return Video(features, dim, *(config[name] for name in (*sizes, "frames", "grid")))
    raise MahlstickError(f"projector must be one of {', '.join(PROJECTORS)}; got {kind!r}.")
