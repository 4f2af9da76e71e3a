"""Projectors: image features into prompt tokens.

Parameter names are those of the published IP-Adapter files, so that a state dict needs no renaming; those of projectors
that nobody has published for an IP-Adapter are ours. As in the published ones, the last thing is a norm, which those of
the language models lack: the keys and values behind it begin as those of text, whose encoder ends in a norm too.

Where a projector takes patches, ``(batch, length, feature_dim)`` row by row, some also take a map of another shape than
a square, ``(batch, height, width, feature_dim)``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mahlstick.adapters import positions
from mahlstick.adapters.qformer import QFormer
from mahlstick.errors import MahlstickError

ProjectorName = Literal[
    "linear",
    "resampler",
    "mlp",
    "video",
    "concat",
    "cross_attention",
    "merger",
    "qformer",
    "instruct_qformer",
]


class Projector(nn.Module):
    """Image features, of the dimensions that ``takes`` names and a last one, to tokens ``(batch, tokens, dim)``."""

    #: Whether it takes the image encoder's one pooled vector.
    pooled: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ("batch", "length")
    #: Whether it takes maps beside lists of patches.
    maps: ClassVar[bool] = False
    #: Whether it reads the prompt's words too.
    reads: bool = False


class Linear(Projector):
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


class MLP(Projector):
    """Two linear layers with GELU and a norm on every feature token (the published "full" variant).

    LLaVA-1.5's (arXiv 2310.03744, section 3.3) is the same without the norm, and ``dim`` wide inside where this one
    is ``feature_dim`` wide. ``(batch, length, feature_dim)`` to ``(batch, length, dim)``.
    """

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


class Resampler(Projector):
    """Learned latents that read all feature tokens (IP-Adapter Plus).

    ``(batch, length, feature_dim)`` to ``(batch, tokens, dim)``; inside it is heads · head_dim wide.
    """

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


class Video(Projector):
    """A clip as one prompt, by InternVideo2's recipe (2403.15377): patches of sparsely sampled frames get positions in
    time, height and width, attend to each other beside a class token, and are pooled by attention.

    ``(batch, frames, length, feature_dim)`` to ``(batch, tokens, dim)``. A frame's features are grid² patches, row by
    row, with or without the encoder's class token in front, which is left out: the clip has a learned one. More frames
    than were trained have their positions interpolated along time.
    """

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


class Concat(Projector):
    """Neighbouring patches, four as published, joined into one vector, and a linear layer (MiniGPT-v2, arXiv
    2310.09478, section 2.1). With ``join`` = 1 it is LLaVA's linear layer on every patch (arXiv 2304.08485, eq. 1).

    ``(batch, length, feature_dim)`` to ``(batch, ⌈length / join⌉, dim)``, of which the encoder's class token is no
    part; a last vector that is not full has its last patch repeated.
    """

    maps = True

    def __init__(self, feature_dim: int, dim: int, join: int) -> None:
        super().__init__()
        self.join = join
        self.joined = nn.Linear(join * feature_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        patches = as_map(features).flatten(1, 2)
        last = patches[:, -1:].expand(-1, -patches.shape[1] % self.join, -1)
        return cast(
            Tensor, self.norm(self.joined(torch.cat([patches, last], dim=1).unflatten(1, (-1, self.join)).flatten(2)))
        )


class CrossAttention(Projector):
    """Learned queries that read the patches in one layer of attention (Qwen-VL, arXiv 2308.12966, section 2.1). Queries
    and keys have sine-cosine positions in two axes, the queries as a square over the whole picture.

    ``(batch, length, feature_dim)`` to ``(batch, tokens, dim)`` for a square number of tokens, 256 as published; inside
    it is heads · head_dim wide. Another resolution than was trained has its patches stand between the places.
    """

    maps = True

    def __init__(self, feature_dim: int, dim: int, tokens: int, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.side = heads, math.isqrt(tokens)
        if self.side**2 != tokens:
            raise MahlstickError(
                f"tokens of cross_attention stand in a square: {tokens} do not, give {self.side**2} or "
                f"{(self.side + 1) ** 2}."
            )
        self.queries = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.proj_in = nn.Linear(feature_dim, width, bias=False)
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)  # attention would not notice a bias of all keys
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        grid = as_map(features)
        x, queries = self.norm_kv(self.proj_in(grid.flatten(1, 2))), self.norm_q(self.queries)
        q = self.to_q(queries + self._places(self.side, self.side, queries)).expand(len(x), -1, -1)
        k, v = self.to_k(x + self._places(grid.shape[1], grid.shape[2], x)), self.to_v(x)
        return cast(Tensor, self.norm_out(self.proj_out(self.to_out(multihead(q, k, v, self.heads)))))

    def _places(self, height: int, width: int, like: Tensor) -> Tensor:
        """The table of a grid whose cells are spread over the queries' square."""
        cells = positions.places_2d(height, width) + 0.5
        places = cells * self.side / torch.tensor([height, width]) - 0.5
        return positions.sincos_2d(places, like.shape[-1]).to(like)


class Merger(Projector):
    """Patches of a picture of any size attend to each other by rotary positions in two axes, and 2 × 2 neighbours
    become one token by two layers with GELU (Qwen2-VL, arXiv 2409.12191, section 2.1): 224² pixels, in patches of 14,
    become 64 tokens.

    ``(batch, height, width, feature_dim)``, or the patches of a square, to ``(batch, ⌈height/2⌉ · ⌈width/2⌉, dim)``; an
    odd side has its last row or column repeated. Inside it is heads · head_dim wide, of which 4 divides head_dim. In
    Qwen2-VL these layers belong to the image encoder.
    """

    maps = True

    def __init__(self, feature_dim: int, dim: int, depth: int, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        if head_dim % 4:
            raise MahlstickError(
                f"heads of a merger turn in two axes: head_dim must be a multiple of 4, not {head_dim}."
            )
        self.proj_in = nn.Linear(feature_dim, width)
        self.blocks = nn.ModuleList(RotaryBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.merge = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, dim))
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        grid = as_map(features)
        height, width = grid.shape[1:3]
        places = positions.places_2d(height, width).to(grid.device)
        x = self.proj_in(grid.flatten(1, 2))
        for block in self.blocks:
            x = block(x, places)
        return cast(Tensor, self.norm_out(self.merge(_by_four(self.norm(x).unflatten(1, (height, width))))))


def _by_four(grid: Tensor) -> Tensor:
    """``(batch, height, width, d)`` to its 2 × 2 neighbours side by side, ``(batch, ⌈height/2⌉ · ⌈width/2⌉, 4 d)``."""
    grid = torch.cat([grid, grid[:, -1:]], dim=1) if grid.shape[1] % 2 else grid
    grid = torch.cat([grid, grid[:, :, -1:]], dim=2) if grid.shape[2] % 2 else grid
    return grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3).flatten(1, 2)


class RotaryBlock(nn.Module):
    """A transformer layer whose queries and keys are turned by the patch's row and column."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x ``(batch, length, width)`` and the places ``(length, 2)`` → as x."""
        q, k, v = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k = (self._turned(part, places) for part in (q, k))
        x = x + self.to_out(multihead(q, k, v, self.heads))
        return cast(Tensor, x + self.ff(self.norm2(x)))

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        by_head = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return positions.rotate_2d(by_head, places).transpose(1, 2).flatten(2)


class Querying(Projector):
    """A Q-Former and the linear layer of its second stage (BLIP-2, arXiv 2301.12597, section 3.2), and a norm.

    With a vocabulary it reads the prompt beside the picture, so that the words choose what of it becomes a token
    (InstructBLIP, arXiv 2305.06500, section 2.3).

    ``(batch, length, feature_dim)``, and words ``(batch, length of the text)`` as `qformer` has them, to
    ``(batch, tokens, dim)``; inside it is heads · head_dim wide.
    """

    def __init__(
        self,
        feature_dim: int,
        dim: int,
        tokens: int,
        depth: int,
        heads: int,
        head_dim: int,
        vocabulary: int = 0,
        places: int = 0,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.reads = vocabulary > 0
        self.qformer = QFormer(feature_dim, tokens, depth, heads, width, vocabulary=vocabulary, places=places)
        self.qformer.drop_last_words()
        self.proj_out = nn.Linear(width, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.norm_out(self.proj_out(self.qformer(features, words)[0])))


def as_map(features: Tensor) -> Tensor:
    """Patches as a map ``(batch, height, width, feature_dim)``, as which they may come.

    Those of a square may come row by row, ``(batch, side², feature_dim)``, with or without the encoder's class token in
    front, which is left out. Raises ``MahlstickError`` for another number.
    """
    if features.ndim == 4:
        return features
    length = features.shape[1]
    for patches in (length, max(0, length - 1)):
        side = math.isqrt(patches)
        if side and side**2 == patches:
            return features[:, -patches:].unflatten(1, (side, side))
    raise MahlstickError(
        f"{length} features are no square of patches, with or without a class token: give those of another shape as a "
        "map (batch, height, width, feature_dim)."
    )


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


_RESAMPLING = ("tokens", "depth", "heads", "head_dim")

#: Each projector's class, and the fields of the config that give its sizes.
_BY_NAME: dict[str, tuple[type[Projector], tuple[str, ...]]] = {
    "linear": (Linear, ("tokens",)),
    "resampler": (Resampler, _RESAMPLING),
    "mlp": (MLP, ()),
    "video": (Video, (*_RESAMPLING, "frames", "grid")),
    "concat": (Concat, ("join",)),
    "cross_attention": (CrossAttention, ("tokens", "heads", "head_dim")),
    "merger": (Merger, ("depth", "heads", "head_dim")),
    "qformer": (Querying, _RESAMPLING),
    "instruct_qformer": (Querying, (*_RESAMPLING, "vocabulary", "places")),
}
PROJECTORS: tuple[str, ...] = get_args(ProjectorName)


def sizes_of(name: str) -> tuple[str, ...]:
    """The fields of the config that a projector is built with. Raises ``MahlstickError`` for an unknown name."""
    if name not in _BY_NAME:
        raise MahlstickError(f"projector must be one of {', '.join(PROJECTORS)}; got {name!r}.")
    return _BY_NAME[name][1]


def build(config: dict[str, Any]) -> Projector:
    """The projector that an IP-Adapter's config names. Raises ``MahlstickError`` for an unknown name."""
    sizes = [config[field] for field in sizes_of(config["projector"])]
    kind = _BY_NAME[config["projector"]][0]
    return kind(config["feature_dim"], config["cross_attention_dim"], *sizes)
