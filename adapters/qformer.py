"""The querying transformer (Q-Former) of BLIP-2 (arXiv 2301.12597): learned queries that read a picture's features, and
words beside them; and the heads of its first stage.

Words are token ids ``(batch, length)``, −1 where a text has none any more: CLIP's tokenizer fills up with a token that
also ends every text, so no id could say that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mahlstick.errors import MahlstickError

#: Who attends to whom (figure 2): queries and words each to their own kind; all to all; queries to queries, and words
#: to queries and to what was said before.
Mask = Literal["unimodal", "bidirectional", "causal"]

LONGEST = 77  # words of a prompt: as many as the text encoder of Stable Diffusion reads
_EPS = 1e-12  # of BERT's norms


class Attention(nn.Module):
    """Attention, its sum with what came in, and a norm: BERT's order. Keys and values are ``context_dim`` wide."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_dim, width)
        self.to_v = nn.Linear(context_dim, width)
        self.to_out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return cast(Tensor, self.norm(x + self.to_out(read)))


class FeedForward(nn.Module):
    """Two layers with GELU, their sum with what came in, and a norm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, inner)
        self.proj_out = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x + self.proj_out(F.gelu(self.proj_in(x)))))


class Block(nn.Module):
    """Self-attention that queries and words share, a look at the picture for the queries, and a feed-forward each."""

    def __init__(self, width: int, heads: int, inner: int, feature_dim: int, looks: bool, reads: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width)
        self.look = Attention(width, heads, feature_dim) if looks else None
        self.of_queries = FeedForward(width, inner)
        self.of_words = FeedForward(width, inner) if reads else None

    def forward(self, x: Tensor, features: Tensor | None, queries: int, mask: Tensor | None) -> Tensor:
        x = self.attention(x, x, mask)
        asked, said = x[:, :queries], x[:, queries:]
        if queries and self.look is not None:
            asked = self.look(asked, features)
        if queries:
            asked = self.of_queries(asked)
        if said.shape[1] and self.of_words is not None:
            said = self.of_words(said)
        return torch.cat([asked, said], dim=1)


class QFormer(nn.Module):
    """Learned queries in a BERT whose every second block attends to the picture (section 3.1).

    ``heads`` divides ``width``; ``vocabulary`` counts the words known, the last of which begins a caption ([DEC]); with
    0 there is no text side, as in what was published after the second stage. ``places``: of the longest text. There is
    no dropout.
    """

    def __init__(
        self,
        feature_dim: int,
        queries: int = 32,
        depth: int = 12,
        heads: int = 12,
        width: int = 768,
        inner: int | None = None,
        every: int = 2,
        vocabulary: int = 0,
        places: int = 512,
    ) -> None:
        super().__init__()
        if width % heads:
            raise MahlstickError(
                f"a Q-Former of {width} channels cannot have {heads} heads: give a divisor of {width}."
            )
        self.width, self.vocabulary = width, vocabulary
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.words = nn.Embedding(vocabulary, width) if vocabulary else None
        self.places = nn.Embedding(places, width) if vocabulary else None
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.blocks = nn.ModuleList(
            Block(width, heads, inner or 4 * width, feature_dim, i % every == 0, bool(vocabulary)) for i in range(depth)
        )
        for module in self.modules():  # as BERT begins
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, features: Tensor | None = None, words: Tensor | None = None, mask: Mask = "bidirectional"
    ) -> tuple[Tensor, Tensor]:
        """Features ``(batch, length, feature_dim)``, words ``(batch, length)`` or both → the queries
        ``(batch, queries, width)`` and the words ``(batch, length, width)``, of which the one not given is empty.

        Raises ``MahlstickError`` for words that it cannot read.
        """
        parts = []
        if features is not None:
            parts.append(self.queries.expand(features.shape[0], -1, -1))
        if words is not None:
            parts.append(self._embedded(words))
        x = self.norm(torch.cat(parts, dim=1))
        count = self.queries.shape[1] if features is not None else 0
        seen = None if words is None else visible(mask, count, words)
        for block in self.blocks:
            x = block(x, features, count, seen)
        return x[:, :count], x[:, count:]

    def drop_last_words(self) -> None:
        """Take out what the words go through last, where nothing reads what becomes of them."""
        cast(Block, self.blocks[-1]).of_words = None

    def _embedded(self, words: Tensor) -> Tensor:
        if self.words is None or self.places is None:
            raise MahlstickError("this Q-Former has no text side: it reads no words.")
        if words.shape[1] > self.places.num_embeddings:
            raise MahlstickError(
                f"{words.shape[1]} words are more than the {self.places.num_embeddings} that this Q-Former has places "
                "for: cut the text."
            )
        return cast(Tensor, self.words(words.clamp(min=0)) + self.places.weight[: words.shape[1]])


def visible(mask: Mask, queries: int, words: Tensor) -> Tensor:
    """Whether row i may attend to column j, of ``queries`` queries and the words ``(batch, length)`` behind them:
    ``(batch, 1, queries + length, queries + length)``. Words that are none are seen by nobody."""
    batch, length = words.shape
    asked = torch.ones(batch, queries, dtype=torch.bool, device=words.device)
    there = torch.cat([asked, words >= 0], dim=1)[:, None, None]
    place = torch.arange(queries + length, device=words.device)
    row, column = place[:, None], place[None]
    if mask == "unimodal":
        allowed = (row < queries) == (column < queries)
    elif mask == "causal":
        allowed = torch.where(row < queries, column < queries, column <= row)
    else:
        allowed = torch.ones_like(row + column, dtype=torch.bool)
    return there & allowed


def token_ids(tokenizer: Any, texts: Sequence[str], vocabulary: int, places: int) -> Tensor:
    """Texts as ids ``(texts, length)``, −1 behind their end, cut to the tokenizer's and the Q-Former's length.

    ``vocabulary``: the Q-Former's, which holds one word more than a tokenizer without [DEC]. Raises ``MahlstickError``
    for another tokenizer than it learned with.
    """
    known = len(tokenizer)
    if known not in (vocabulary, vocabulary - 1):
        raise MahlstickError(
            f"the tokenizer knows {known:,} words and the Q-Former {vocabulary - 1:,}: give the one that it was "
            "trained with (tokenizer=)."
        )
    length = min(tokenizer.model_max_length, places, LONGEST)
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return cast(Tensor, found.input_ids.masked_fill(found.attention_mask == 0, -1))


class CaptionHead(nn.Module):
    """What word comes next: BERT's head, whose last layer is the table of words."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, said: Tensor, words: nn.Embedding) -> Tensor:
        return F.linear(self.norm(F.gelu(self.proj(said))), words.weight, self.bias)


class ImageText(nn.Module):
    """A Q-Former with the heads of the first stage (section 3.1): contrast (ITC), match (ITM), caption (ITG).

    ``config``: the sizes of :class:`QFormer`; ``contrast_dim``, ``match`` and ``caption`` say which heads there are (0
    and False: not). After the second stage none is left.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.qformer = QFormer(**{name: value for name, value in config.items() if name not in HEADS})
        width, vocabulary, dim = config["width"], config["vocabulary"], config["contrast_dim"]
        self.image_proj = nn.Linear(width, dim) if dim else None
        self.text_proj = nn.Linear(width, dim) if dim else None
        self.match_head = nn.Linear(width, 2) if config["match"] else None
        self.caption_head = CaptionHead(width, vocabulary) if config["caption"] else None

    def images(self, features: Tensor) -> Tensor:
        """Unit vectors of a picture's queries, ``(batch, queries, contrast_dim)``."""
        return F.normalize(self._head("image_proj")(self.qformer(features)[0]), dim=-1)

    def texts(self, words: Tensor) -> Tensor:
        """Unit vectors of texts, of their first word: ``(batch, contrast_dim)``."""
        said = self.qformer(words=words, mask="unimodal")[1]
        return F.normalize(self._head("text_proj")(said[:, 0]), dim=-1)

    def matches(self, features: Tensor, words: Tensor) -> Tensor:
        """Logits that picture and text do not match and that they do, ``(batch, 2)``: the mean over queries."""
        return cast(Tensor, self._head("match_head")(self.qformer(features, words)[0]).mean(dim=1))

    def next_words(self, features: Tensor, words: Tensor) -> Tensor:
        """Logits of the word behind each, ``(batch, length, vocabulary)``; [DEC] takes the place of the first word."""
        head = self._head("caption_head")
        begun = torch.cat([torch.full_like(words[:, :1], self.qformer.vocabulary - 1), words[:, 1:]], dim=1)
        return cast(Tensor, head(self.qformer(features, begun, "causal")[1], self.qformer.words))

    @torch.no_grad()
    def captions(self, features: Tensor, end: int, length: int = LONGEST) -> Tensor:
        """The likeliest word after the other, until ``end``: ids ``(batch, ≤ length)``, −1 behind the end."""
        words = torch.zeros(features.shape[0], 1, dtype=torch.long, device=features.device)
        done = torch.zeros(len(words), dtype=torch.bool, device=features.device)
        while words.shape[1] < length and not done.all():
            found = self.next_words(features, words)[:, -1].argmax(dim=-1)
            words = torch.cat([words, found.masked_fill(done, -1)[:, None]], dim=1)
            done |= found == end
        return words[:, 1:]

    def _head(self, name: str) -> nn.Module:
        head = getattr(self, name)
        if head is None:
            raise MahlstickError(f"this Q-Former has no {name.replace('_', ' ')}: it is one after its first stage.")
        return cast(nn.Module, head)


HEADS = ("contrast_dim", "match", "caption")


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Of pictures ``(N, queries, d)`` and texts ``(M, d)``, ``(N, M)``: the best over the queries (section 3.1)."""
    return torch.einsum("nqd,md->nmq", images, texts).amax(dim=-1)
