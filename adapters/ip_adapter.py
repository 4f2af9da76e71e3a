"""IP-Adapter: decoupled cross-attention fed by image features (Ye et al., arXiv 2308.06721).

Equation 5 of the paper: Z = softmax(QKᵀ/√d)V + λ·softmax(QK′ᵀ/√d)V′ with K′ = c·W′k and V′ = c·W′v, where c are the
image tokens. The first term is the UNet's own; the second is added to it before the output projection, by a hook
there, with the query that a hook on the query projection has seen. No attention processor is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mahlstick.adapters import projectors
from mahlstick.adapters.base import Adapter, Attachment, Clock, Window, number, spread, unwrap
from mahlstick.adapters.image_encoder import ImageEncoder, Layer, checked_layer, load_encoder
from mahlstick.adapters.qformer import token_ids
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# The tokens (n, tokens, dim) for a number of pictures, n being 1, that number or a divisor of it.
Tokens = Callable[[int], Tensor]
Blocks = Literal["all", "style", "layout"] | Mapping[str, float]

# Which transformer blocks carry style and which layout, by the UNet's number of levels: for SDXL as InstantStyle
# (arXiv 2404.02733) found; for SD 1.x and 2.x the layers and weights that ComfyUI_IPAdapter_plus uses.
_SHARES: dict[tuple[str, int], dict[str, float]] = {
    ("style", 3): {"up_blocks.0.attentions.1": 1.0},
    ("layout", 3): {"down_blocks.2.attentions.1": 1.0},
    ("style", 4): {
        "down_blocks.0": 1.0,
        "down_blocks.1": 1.0,
        "up_blocks.1.attentions.2": 1.0,
        "up_blocks.2": 1.0,
        "up_blocks.3": 1.0,
    },
    ("layout", 4): {"down_blocks.2.attentions.0": 0.25, "down_blocks.2.attentions.1": 1.0},
}


class KeyValue(nn.Module):
    """W′k and W′v of one cross-attention layer."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(dim, width, bias=False)
        self.to_v_ip = nn.Linear(dim, width, bias=False)


class IPAdapter(Adapter):
    """A projector from image features to tokens, and a W′k, W′v pair for each cross-attention of a UNet.

    Parameter names are those of the published files: ``image_proj.*`` and ``ip_adapter.{1, 3, 5, …}``, numbered in
    the order down blocks, up blocks, middle block.
    """

    kind = "ip_adapter"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.image_proj = projectors.build(config)
        #: What of the image encoder its projector reads.
        self.layer: Layer = checked_layer(config.get("layer"), self.image_proj.pooled)
        dim = config["cross_attention_dim"]
        self.ip_adapter = nn.ModuleDict({index: KeyValue(width, dim) for index, width in config["layers"].items()})
        self._encoder: tuple[Any, Any] = (None, None)  # in a tuple, so that it is no submodule of ours
        #: Whose ids a projector reads; None: the pipeline's.
        self.tokenizer: Any = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from config fields with fresh weights."""
        return cls(config)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        projector: projectors.ProjectorName = "linear",
        tokens: int = 4,
        feature_dim: int = 1024,
        *,
        depth: int = 4,
        heads: int = 12,
        head_dim: int = 64,
        frames: int = 8,
        grid: int = 16,
        join: int = 4,
        vocabulary: int = 49_409,
        places: int = 77,
        layer: Layer | None = None,
    ) -> Self:
        """Fresh, for ``unet``'s layers: W′k and W′v start as the text's Wk and Wv (section 3.2.2).

        ``feature_dim`` is the width of the image encoder's output, pooled for ``linear`` and per patch for the others,
        of its ``layer``: ``"patches"`` for the last without class token, or the number of a hidden one; left out, the
        last but one.
        Which of the sizes a projector has is in `projectors`: all but ``linear``, ``mlp`` and ``concat`` are
        heads · head_dim wide inside; ``mlp``, ``concat`` and ``merger`` give as many tokens as the picture has patches,
        or a part of them. A video projector reads ``frames`` of a clip, of grid × grid patches each. What reads the
        prompt knows ``vocabulary`` words, one more than the tokenizer, and ``places`` of them in a text; left out,
        those of CLIP.
        """
        sizes: dict[str, Any] = {"tokens": tokens, "depth": depth, "heads": heads, "head_dim": head_dim,
                                 "frames": frames, "grid": grid, "join": join, "vocabulary": vocabulary,
                                 "places": places}  # fmt: skip
        unet = cast("UNet2DConditionModel", unwrap(unet))
        layers = dict(cross_attentions(unet))
        first = next(iter(layers.values()))
        config: dict[str, Any] = {
            "projector": projector,
            "feature_dim": feature_dim,
            "cross_attention_dim": first.to_k.in_features,
            "layers": {str(2 * i + 1): attn.to_k.out_features for i, attn in enumerate(layers.values())},
            "layer": layer,
        }
        # An mlp has as many tokens as the encoder gives; its config says how many those are.
        config |= {name: sizes[name] for name in projectors.sizes_of(projector) or ("tokens",)}
        if first.to_k.weight.is_meta:
            raise MahlstickError("the UNet's own weights are not in their places: switch offload off before from_unet.")
        adapter = cls(config)
        for pair, attn in zip(adapter._pairs(), layers.values(), strict=True):
            pair.to_k_ip.weight.data.copy_(attn.to_k.weight)
            pair.to_v_ip.weight.data.copy_(attn.to_v.weight)
        return adapter.to(unet.device, unet.dtype).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        image_encoder: Any = None,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        **config: Any,
    ) -> Self:
        """Load as :meth:`Adapter.from_pretrained`; ``image_encoder`` is a vision model, its folder or hub id, and
        ``tokenizer``, of a projector that reads the prompt, one of transformers or its folder; left out, that in the
        folder ``tokenizer`` beside the weights, where ``mahlstick train`` writes it."""
        adapter = super().from_pretrained(path, dtype=dtype, **config)
        if image_encoder is not None:
            adapter.use_encoder(image_encoder)
        beside = (Path(path) if Path(path).is_dir() else Path(path).parent) / "tokenizer"
        if tokenizer is None and adapter.reads and beside.is_dir():
            tokenizer = beside
        adapter.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, PathLike)) else tokenizer
        return adapter

    def use_encoder(self, model: Any, processor: Any = None) -> None:
        """Encode pictures with this vision model (a transformers module, folder or hub id) and its image processor."""
        if isinstance(model, (str, PathLike)):
            model, processor = load_encoder(model)
        self._check_encoder(ImageEncoder(model, processor))
        self._encoder = (model, processor)

    def _check_encoder(self, encoder: ImageEncoder) -> None:
        width = encoder.width(self.layer)
        if width is not None and width != self.config["feature_dim"]:
            raise MahlstickError(
                f"this IP-Adapter reads features of {self.config['feature_dim']} numbers and the image encoder "
                f"gives {width}: give the encoder it was trained with (image_encoder=)."
            )

    @property
    def image_encoder(self) -> Any:
        """The vision model in use, or None."""
        return self._encoder[0]

    @torch.no_grad()
    def features(self, pictures: Sequence[Any], encoder: tuple[Any, Any] = (None, None)) -> tuple[Tensor, Tensor]:
        """Features of PIL pictures, and those that stand for no picture.

        Pooled ``(n, feature_dim)`` for a linear projector, of all patches of its ``layer``
        ``(n, length, feature_dim)`` for the others; for a video projector the pictures are the frames of one clip,
        ``(1, n, length, feature_dim)``. No picture is zeros for pooled features, and the features of an input of zeros
        for the others, as in the published code. ``encoder`` (a vision model and its processor) serves an adapter that
        has none of its own. Raises ``MahlstickError`` without an image encoder.
        """
        model, processor = self._encoder if self._encoder[0] is not None else encoder
        if model is None:
            raise MahlstickError(
                "this IP-Adapter has no image encoder: give image_encoder= to from_pretrained, use a pipeline that has "
                "one, or give features= to ImagePrompt."
            )
        eyes = ImageEncoder(model, processor)
        self._check_encoder(eyes)
        pixels = eyes.prepare(pictures)
        if self.image_proj.pooled:
            pooled = eyes.see(pixels, self.layer)
            return pooled, torch.zeros_like(pooled[:1])
        both = eyes.see(torch.cat([pixels, torch.zeros_like(pixels[:1])]), self.layer)
        found, nothing = both[:-1], both[-1:]
        if isinstance(self.image_proj, projectors.Video):
            return found[None], nothing.expand_as(found)[None]
        return found, nothing

    @property
    def reads(self) -> bool:
        """Whether its tokens depend on the prompt too."""
        return self.image_proj.reads

    def words(self, prompts: Sequence[str], tokenizer: Any = None) -> Tensor:
        """Prompts as its projector reads them, ``(prompts, length)``; ``tokenizer`` serves an adapter that has none.

        Raises ``MahlstickError`` without a tokenizer, and for another one than it was trained with.
        """
        tokenizer = self.tokenizer if self.tokenizer is not None else tokenizer
        if tokenizer is None:
            raise MahlstickError(
                "this IP-Adapter's projector reads the prompt and there is no tokenizer: attach it to a pipeline, or "
                "give tokenizer= to from_pretrained."
            )
        return token_ids(tokenizer, prompts, self.config["vocabulary"], self.config["places"])

    def tokens(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        """Image features as prompt tokens ``(batch, tokens, cross_attention_dim)``; a projector that reads the prompt
        needs its ``words`` too, one row for each picture or one for all.

        Raises ``MahlstickError`` for features of the wrong shape, and where words are missing.
        """
        takes, width = self.image_proj.takes, self.config["feature_dim"]
        ranks = (len(takes) + 1, 4) if self.image_proj.maps else (len(takes) + 1,)
        if features.ndim not in ranks or features.shape[-1] != width:
            raise MahlstickError(
                f"this IP-Adapter's projector ({self.config['projector']}) takes features of shape "
                f"({', '.join(takes)}, {width}); got {tuple(features.shape)}."
            )
        features = features.to(self.device, self.dtype)
        if not self.reads:
            return cast(Tensor, self.image_proj(features))
        if words is None:
            raise MahlstickError("this IP-Adapter's projector reads the prompt: give prompt= to ImagePrompt.")
        return cast(Tensor, self.image_proj(features, words.to(self.device).expand(len(features), -1)))

    def forward(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        """The same as :meth:`tokens`."""
        return self.tokens(features, words)

    def _pairs(self) -> list[KeyValue]:
        return [cast(KeyValue, self.ip_adapter[index]) for index in sorted(self.ip_adapter, key=int)]

    def attach(
        self,
        unet: UNet2DConditionModel,
        tokens: Tensor | Tokens,
        *,
        negative: Tensor | Tokens | None = None,
        scale: float = 1.0,
        mask: Tensor | None = None,
        blocks: Blocks = "all",
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> ImageAttachment:
        """Clip the adapter on ``unet`` with image tokens ``(n, tokens, dim)``.

        ``negative`` are the tokens of the unconditional part.

        ``mask`` ``(n, 1, H, W)`` is 1 where the adapter acts. ``blocks`` is ``"all"``, ``"style"``, ``"layout"`` or a
        share for each block by its name in the UNet (``{"up_blocks.1": 0.5}``; the longest name that fits wins,
        others get 0).
        """
        return ImageAttachment(self, unet, tokens, negative, scale, mask, blocks, window, clock).fasten()


class ImageAttachment(Attachment):
    """An IP-Adapter clipped on a UNet: adds the second term of equation 5 in every cross-attention."""

    adapter: IPAdapter

    def __init__(
        self,
        adapter: IPAdapter,
        unet: UNet2DConditionModel,
        tokens: Tensor | Tokens,
        negative: Tensor | Tokens | None = None,
        scale: float = 1.0,
        mask: Tensor | None = None,
        blocks: Blocks = "all",
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(adapter, unet, window, clock)
        self.scale = number(scale, "scale")
        self.tokens = tokens
        self.negative = negative
        self.mask = mask
        layers = dict(cross_attentions(self.unet))
        shares = _shares(list(layers), blocks, len(self.unet.config.block_out_channels))
        self._layers = [
            _Layer(self, attn, pair, share)
            for attn, pair, share in zip(layers.values(), adapter._pairs(), shares, strict=True)
            if share
        ]
        self.active = False
        self.batch = 0
        self.size = (0, 0)
        self.parts: tuple[str, ...] | None = None
        self._masks: dict[tuple[int, Any], Tensor] = {}

    def _fasten(self) -> None:
        for layer in self._layers:
            layer.follow()
        if self.compiled:
            # Dynamo does not guard the hooks of inner modules: compiled code would go on without these.
            torch._dynamo.reset()

    def detach(self) -> None:
        for layer in self._layers:
            layer.release()
        super().detach()

    def _forget(self) -> None:
        self.active = False
        self._masks.clear()
        for layer in self._layers:
            layer.forget()

    def use(self, tokens: Tensor | Tokens, negative: Tensor | Tokens | None = None) -> None:
        """Change the image tokens while attached."""
        self.tokens, self.negative = tokens, negative
        self._forget()

    @property
    def acts(self) -> bool:
        return self.scale != 0.0

    def _contribute(self, arguments: dict[str, Any], parts: tuple[str, ...] | None, acts: bool) -> dict[str, Any]:
        batch, size = arguments["sample"].shape[0], tuple(arguments["sample"].shape[-2:])
        if (batch, size) != (self.batch, self.size):
            self._forget()
        self.batch, self.size, self.parts, self.active = batch, size, parts, acts
        for layer in self._layers:
            layer.follow()
        return {}

    def rows(self) -> Tensor:
        """The tokens of every row of the batch: the negative ones in its unconditional part."""
        parts = self.parts
        size = self.batch // len(parts or ("cond",))
        whole = self.excerpt.whole if self.excerpt is not None else size
        tokens = self.tokens(whole) if callable(self.tokens) else self.tokens
        if parts is None or "uncond" not in parts:
            return spread(tokens, self.batch, parts, self.excerpt)
        negative = self.negative(whole) if callable(self.negative) else self.negative
        if negative is None:
            raise MahlstickError("under guidance the unconditional half needs tokens of its own: give negative=.")
        tokens, negative = (spread(rows, size, ("cond",), self.excerpt) for rows in (tokens, negative))
        tokens, negative = _same_length(tokens, negative)
        return torch.cat([negative if part == "uncond" else tokens for part in parts])

    def mask_for(self, queries: int) -> Tensor:
        """The mask at a layer's resolution ``(batch, queries, 1)``, bicubic as in diffusers."""
        if (queries, self.parts) not in self._masks:
            assert self.mask is not None
            small = F.interpolate(self.mask.float(), size=_grid(self.size, queries), mode="bicubic")
            by_query = small.flatten(2).transpose(1, 2)
            self._masks[queries, self.parts] = spread(by_query, self.batch, self.parts, self.excerpt)
        return self._masks[queries, self.parts]


def _same_length(tokens: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the shorter: attention over every key twice is attention over every key once."""
    longest = max(tokens.shape[1], negative.shape[1])
    if longest % tokens.shape[1] or longest % negative.shape[1]:
        raise MahlstickError(
            f"{negative.shape[1]} negative tokens do not go with {tokens.shape[1]}: give as many negative pictures "
            "as references, or one."
        )
    return tokens.repeat(1, longest // tokens.shape[1], 1), negative.repeat(1, longest // negative.shape[1], 1)


class _Layer:
    """The hooks on one cross-attention layer."""

    def __init__(self, owner: ImageAttachment, attn: Any, pair: KeyValue, share: float) -> None:
        self.owner, self.attn, self.pair, self.share = owner, attn, pair, share
        self.hooked: tuple[nn.Module, nn.Module] | None = None
        self.handles: list[Any] = []
        self.query: Tensor | None = None
        self.keys: dict[Any, tuple[Tensor, Tensor]] = {}

    def follow(self) -> None:
        """Hook the projections; again if something (LoRA) has put others in their place."""
        if self.hooked is not None and self.hooked[0] is self.attn.to_q and self.hooked[1] is self.attn.to_out[0]:
            return
        self.release()
        self.hooked = (self.attn.to_q, self.attn.to_out[0])
        self.handles = [
            self.attn.to_q.register_forward_hook(self._see_query),
            self.attn.to_out[0].register_forward_pre_hook(self._add),
        ]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.hooked = [], None

    def forget(self) -> None:
        self.query = None
        self.keys.clear()

    def _see_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.owner.active:
            self.query = output

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        query, self.query = self.query, None
        if query is None or not self.owner.active:
            return None
        k, v = self._keys(query)
        extra = projectors.multihead(self._normed(query), k, v, self.attn.heads)
        if self.owner.mask is not None:
            extra = extra * self.owner.mask_for(query.shape[1]).to(extra)
        return (args[0] + self.owner.scale * self.share * extra, *args[1:])

    def _normed(self, query: Tensor) -> Tensor:
        if getattr(self.attn, "norm_q", None) is None:
            return query
        return cast(Tensor, self.attn.norm_q(query.unflatten(-1, (self.attn.heads, -1))).flatten(-2))

    def _keys(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """K′ and V′ of every row: once for a condition, or afresh while they are learned."""
        key = self.owner.parts, query.dtype
        if key in self.keys and not torch.is_grad_enabled():
            return self.keys[key]
        tokens = self.owner.rows().to(query.device, self.pair.to_k_ip.weight.dtype)
        k, v = self.pair.to_k_ip(tokens).to(query.dtype), self.pair.to_v_ip(tokens).to(query.dtype)
        if not torch.is_grad_enabled():
            self.keys[key] = k, v
        return k, v


def cross_attentions(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each text cross-attention in the published files' order: down, up, middle."""
    for section in ("down_blocks", "up_blocks", "mid_block"):
        part = getattr(unet, section, None)
        for name, module in part.named_modules() if part is not None else ():
            if name.split(".")[-1] == "attn2":
                yield f"{section}.{name}", module


def _shares(layers: list[str], blocks: Blocks, levels: int) -> list[float]:
    """The share of the dose for each layer by name."""
    if blocks == "all":
        return [1.0] * len(layers)
    chosen = (
        blocks if isinstance(blocks, Mapping) else _SHARES.get((blocks, levels)) if isinstance(blocks, str) else None
    )
    if chosen is None:
        raise MahlstickError(
            f"blocks={blocks!r} is not known for this UNet: give 'all', 'style' or 'layout' (SD and SDXL), or a dict "
            "of block names."
        )
    shares = {f"{prefix}.": number(share, f"blocks[{prefix!r}]") for prefix, share in chosen.items()}
    for prefix in shares:
        if not any(f"{layer}.".startswith(prefix) for layer in layers):
            raise MahlstickError(f"blocks: {prefix[:-1]!r} names no cross-attention of this UNet.")
    fitting = [[prefix for prefix in shares if f"{layer}.".startswith(prefix)] for layer in layers]
    return [shares[max(prefixes, key=len)] if prefixes else 0.0 for prefixes in fitting]


def _grid(size: tuple[int, int], queries: int) -> tuple[int, int]:
    """Height and width of the level of the UNet that has this many positions; each level halves, rounding up."""
    height, width = size
    while height * width > queries:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def load_tokenizer(path: str | PathLike[str]) -> Any:
    """A tokenizer of transformers. Raises ``MahlstickError`` where the folder or hub id has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise MahlstickError(f"no tokenizer could be loaded from {path}: give a folder with one ({error}).") from error
