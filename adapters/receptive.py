"""A ruler for networks: what each convolution of a network sees of its input.

Along one side, layer l with kernel k, stride s, padding p and dilation d makes of n inputs
⌊(n + 2p − d·(k − 1) − 1)/s⌋ + 1 outputs. Its jump, the inputs between two neighbouring outputs, and its receptive field
are j_l = j_{l−1}·s_l and r_l = r_{l−1} + (k_l − 1)·d_l·j_{l−1} with j_0 = r_0 = 1 (Araujo, Norris and Sim, Computing
receptive fields of convolutional neural networks, doi 10.23915/distill.00021). The jump is that *before* the layer: the
layer's own stride moves its outputs apart, not the inputs of one of them.

The layers and what feeds them are read from the graph that autograd records of one pass on the meta device, which
computes nothing. So shortcuts and branches count as they are joined: their field is that of all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError

Sides = tuple[int, int]  # of height and width

PICTURE, LATENTS = 512, 64  # pixels of a side of Stable Diffusion 1's pictures, and of its latents


@dataclass(frozen=True)
class Layer:
    """One layer of a network, along height and width.

    ``size``: of its output. ``jump``: inputs between two neighbouring outputs. ``field``: inputs that one output sees
    through convolutions; ``start``: where the centre of the first output's field lies, 0 being the first input's
    (padding can put it before that). ``whole``: an attention or a mean before it has seen the whole picture.
    """

    name: str
    kind: str
    kernel: Sides
    stride: Sides
    padding: Sides
    dilation: Sides
    size: Sides
    jump: Sides
    field: Sides
    start: tuple[float, float]
    whole: bool


@dataclass(frozen=True)
class _Span:
    """Along one side: how many outputs there are, and the first and last input that output 0 sees."""

    size: int
    jump: int = 1
    first: int = 0
    last: int = 0

    def behind(self, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> _Span:
        """Of a layer that reads this one's outputs."""
        reach = (kernel - 1) * dilation
        size = (self.size + 2 * padding - reach - 1 + (stride - 1) * ceil) // stride + 1
        if ceil and (size - 1) * stride >= self.size + padding:  # torch: no window begins behind the picture
            size -= 1
        first = self.first - padding * self.jump
        return _Span(size, self.jump * stride, first, self.last - padding * self.jump + reach * self.jump)

    def padded(self, before: int, after: int) -> _Span:
        shift = before * self.jump
        return _Span(self.size + before + after, self.jump, self.first - shift, self.last - shift)


@dataclass(frozen=True)
class _Sight:
    """What a tensor in the graph sees; without spans it has no places any more."""

    spans: tuple[_Span, _Span] | None
    whole: bool = False


def receptive_fields(module: nn.Module, size: int | Sides, channels: int | None = None) -> list[Layer]:
    """The convolutions and poolings of ``module`` in the order in which they run.

    ``size``: height and width of its input ``(n, channels, height, width)``; ``channels``, left out, those of its
    first convolution. The module is left as it is: neither computed with nor moved.

    Everything that is no convolution, pooling, padding, attention or mean over the picture is taken to act on each
    place by itself. Of normalisations that is not the whole truth: the statistics of a group norm are of the whole
    picture. Raises ``MahlstickError`` for a module without convolutions, and for one whose places cannot be followed
    (resampling, transposed convolutions).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if channels is None:
        channels = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if channels is None:
        raise MahlstickError(f"{type(module).__name__} has no 2-d convolution; there are no receptive fields to tell")
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    meta = {name: torch.empty_like(value, device="meta") for name, value in named.items()}
    for value in meta.values():
        value.requires_grad_(value.is_floating_point())
    dtype = next(module.parameters()).dtype
    x = torch.empty(2, channels, height, width, device="meta", dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            outputs = torch.func.functional_call(module, meta, (x,))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MahlstickError(
            f"{type(module).__name__} does not run on an input of {channels} x {height} x {width} ({reason}); give "
            "another size, or a module that takes one picture"
        ) from error
    return _Walk(x, {id(value): name for name, value in meta.items()}).layers(outputs)


def receptive_fields_of(source: str | PathLike[str], size: int | Sides | None = None) -> list[Layer]:
    """`receptive_fields` of the weights in a file or folder, from the header or config alone.

    A ControlNet, in any layout: its hint encoder and the encoder behind it, as they see the control picture; ``size``
    is the picture's. A folder with a UNet (a base's, or its own): its encoder, as it sees the latents; ``size`` is
    theirs. A SparseCtrl: its hint encoder. Raises ``MahlstickError`` for other weights: a file tells the kernels of its
    convolutions, not their strides.
    """
    from mahlstick.adapters.controlnet import ControlNet
    from mahlstick.adapters.sparse_control import SparseControlNet

    unet = _unet_folder(Path(source).expanduser())
    if unet is not None:
        return _of_unet(unet, size or LATENTS)
    info = formats.inspect(source)
    with torch.device("meta"):
        if info.kind == "controlnet":
            net = ControlNet.from_config(info.config)
            return _of_encoder(_Encoder(net, hinted=True), size or PICTURE, info.config["conditioning_channels"])
        if info.kind == "sparse_controlnet":
            hints = SparseControlNet.from_config(info.config).controlnet_cond_embedding
            return receptive_fields(hints, size or PICTURE)
    raise MahlstickError(
        f"{source} is {info.note.partition(':')[0]}: the strides of its convolutions are not known here; give a "
        "ControlNet or a diffusers folder of a UNet, or an nn.Module to mahlstick.receptive_fields in Python"
    )


def _unet_folder(path: Path) -> Path | None:
    return next((f for f in (path, path / "unet") if (f / "config.json").is_file() and _is_unet(f)), None)


def _is_unet(folder: Path) -> bool:
    return '"UNet2DConditionModel"' in (folder / "config.json").read_text(encoding="utf-8")


def _of_unet(folder: Path, size: int | Sides) -> list[Layer]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    return _of_encoder(_Encoder(unet), size, unet.config.in_channels)


def _of_encoder(encoder: _Encoder, size: int | Sides, channels: int) -> list[Layer]:
    found = receptive_fields(encoder, size, channels)
    return [replace(layer, name=layer.name.removeprefix("module.")) for layer in found]


class _Encoder(nn.Module):
    """From latents to a UNet's middle block, or from a picture to a ControlNet's, by way of its hint encoder.

    Words, time and SDXL's sizes are nothing, since where a place looks does not depend on them.
    """

    def __init__(self, module: nn.Module, hinted: bool = False) -> None:
        super().__init__()
        self.module, self.hinted = module, hinted

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self.module
        config, found = module.config, []
        last = module.mid_block if module.mid_block is not None else module.down_blocks[-1]
        hook = last.register_forward_hook(lambda *call: found.append(call[-1]))
        sample = x
        if self.hinted:
            factor = module.hint_factor
            sample = x.new_empty(x.shape[0], config["in_channels"], x.shape[2] // factor, x.shape[3] // factor)
        text = x.new_empty(x.shape[0], 1, _text_width(config))
        given = {"image": x} if self.hinted else {}
        try:
            module(sample, x.new_zeros(x.shape[0]), text, added_cond_kwargs=_added(config, x), **given)
        finally:
            hook.remove()
        return cast(Tensor, found[0][0] if isinstance(found[0], tuple) else found[0])


def _text_width(config: Mapping[str, Any]) -> int:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


def _added(config: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
    """SDXL's pooled text and its six sizes."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {"text_embeds": x.new_empty(x.shape[0], pooled), "time_ids": x.new_empty(x.shape[0], 6)}


# Autograd's names of what changes the places of a picture, and how a layer of that kind is called here.
_WINDOWS = {
    "ConvolutionBackward0": "convolution",
    "MaxPool2DWithIndicesBackward0": "max pool",
    "AvgPool2DBackward0": "mean pool",
    "PixelUnshuffleBackward0": "unshuffle",
}
_PADDINGS = ("ConstantPadNdBackward0", "ReflectionPad2DBackward0", "ReplicationPad2DBackward0")
_ATTENTIONS = ("ScaledDotProduct", "Softmax", "SafeSoftmax")  # how their names begin
_LOST = ("Upsample", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "PixelShuffle", "GridSampler", "Col2Im", "Im2Col")


class _Walk:
    """From the input through autograd's graph, node by node in the order of the pass."""

    def __init__(self, x: Tensor, names: Mapping[int, str]) -> None:
        self.x, self.names = x, names
        self.sights: dict[Any, _Sight] = {}
        self.found: list[Layer] = []

    def layers(self, outputs: Any) -> list[Layer]:
        for node in _in_order(outputs):
            sight = self._sight(node)
            if sight is not None:
                self.sights[node] = sight
        return self.found

    def _sight(self, node: Any) -> _Sight | None:
        """What the node's output sees, or None if nothing of the input."""
        if getattr(node, "variable", None) is self.x:
            height, width = self.x.shape[-2:]
            return _Sight((_Span(height), _Span(width)))
        sources = [self.sights[parent] for parent, _ in node.next_functions if parent in self.sights]
        if not sources:
            return None
        name, seen = node.name(), self._joined(node, sources)
        if seen.spans is None:
            return seen
        if name in _WINDOWS:
            return self._behind_window(node, seen)
        if name in _PADDINGS:
            left, right, top, bottom = [*_saved(node, "pad", "padding"), 0, 0][:4]
            return _Sight((seen.spans[0].padded(top, bottom), seen.spans[1].padded(left, right)), seen.whole)
        if name.startswith(_ATTENTIONS):
            return _Sight(seen.spans, whole=True)
        if name == "MeanBackward1" and _over_places(node):
            return _Sight(None, whole=True)
        if name.startswith(_LOST):
            raise MahlstickError(f"{name.removesuffix('Backward0')} resamples the picture: behind it no jump is known")
        return seen

    def _joined(self, node: Any, sources: list[_Sight]) -> _Sight:
        """Of several: from the first input that any of them sees to the last."""
        whole = any(sight.whole for sight in sources)
        spans = [sight.spans for sight in sources if sight.spans is not None]
        if not spans:
            return _Sight(None, whole)
        if len({(rows.size, rows.jump, columns.size, columns.jump) for rows, columns in spans}) > 1:
            raise MahlstickError(f"{node.name()} joins branches of different sizes: their places cannot be followed")
        rows, columns = zip(*spans, strict=True)
        return _Sight((_union(rows), _union(columns)), whole)

    def _behind_window(self, node: Any, seen: _Sight) -> _Sight:
        assert seen.spans is not None
        kind = _WINDOWS[node.name()]
        name = self._name(node) or kind
        given = _saved(node, "input", "self")
        if given is not None and tuple(given.shape[-2:]) != tuple(span.size for span in seen.spans):
            raise MahlstickError(f"{name} reads places that were rearranged on the way: they cannot be followed")
        kernel, stride, padding, dilation, ceil = _window(node, name)
        spans = tuple(
            span.behind(k, s, p, d, ceil)
            for span, k, s, p, d in zip(seen.spans, kernel, stride, padding, dilation, strict=True)
        )
        sight = _Sight(cast(tuple[_Span, _Span], spans), seen.whole)
        self.found.append(_layer(name, kind, kernel, stride, padding, dilation, sight))
        return sight

    def _name(self, node: Any) -> str:
        """Of the module whose weight a convolution has; empty for other nodes."""
        weights = (self.names.get(id(getattr(parent, "variable", None))) for parent, _ in node.next_functions[1:2])
        return next((name.removesuffix(".weight") for name in weights if name), "")


def _in_order(outputs: Any) -> list[Any]:
    """The nodes of autograd's graph behind the outputs, in the order in which the pass made them."""
    waiting = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    nodes = set(waiting)
    while waiting:
        parents = {parent for parent, _ in waiting.pop().next_functions if parent is not None} - nodes
        nodes |= parents
        waiting += parents
    # Leaves have no number of their own in the pass: they count from behind.
    leaf = max((node._sequence_nr() for node in nodes), default=0)
    return sorted(nodes, key=lambda node: -1 if hasattr(node, "variable") else min(node._sequence_nr(), leaf))


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from (tensor for value in outputs.values() for tensor in _tensors(value))
    elif isinstance(outputs, (list, tuple)):
        yield from (tensor for value in outputs for tensor in _tensors(value))


def _saved(node: Any, *names: str) -> Any:
    """What autograd saved for the backward pass under one of these names."""
    return next((getattr(node, f"_saved_{name}") for name in names if hasattr(node, f"_saved_{name}")), None)


def _window(node: Any, name: str) -> tuple[Sides, Sides, Sides, Sides, bool]:
    """Kernel, stride, padding, dilation, and whether sizes are rounded up."""
    kind = node.name()
    if kind == "PixelUnshuffleBackward0":
        factor = (node._saved_downscale_factor,) * 2
        return factor, factor, (0, 0), (1, 1), False
    if kind == "ConvolutionBackward0":
        if node._saved_transposed:
            raise MahlstickError(f"{name} is a transposed convolution: behind it no jump is known")
        kernel = tuple(node._saved_weight.shape[2:])
        return kernel, node._saved_stride, node._saved_padding, node._saved_dilation, False
    kernel = _pair(node._saved_kernel_size)
    stride = _pair(node._saved_stride) if node._saved_stride else kernel
    dilation = _pair(getattr(node, "_saved_dilation", 1))
    return kernel, stride, _pair(node._saved_padding), dilation, node._saved_ceil_mode


def _pair(value: Any) -> Sides:
    pair = (value,) if isinstance(value, int) else tuple(value)
    return cast(Sides, pair * 2 if len(pair) == 1 else pair)


def _over_places(node: Any) -> bool:
    """Whether a mean goes over height or width of a picture ``(n, channels, height, width)``."""
    rank = len(node._saved_self_sym_sizes)
    axes = {axis - 2**64 if axis >= 2**63 else axis for axis in node._saved_dim}  # autograd keeps them unsigned
    return rank == 4 and any(axis % rank in (2, 3) for axis in axes)


def _union(spans: tuple[_Span, ...]) -> _Span:
    first, last = min(span.first for span in spans), max(span.last for span in spans)
    return _Span(spans[0].size, spans[0].jump, first, last)


def _layer(name: str, kind: str, kernel: Sides, stride: Sides, padding: Sides, dilation: Sides, sight: _Sight) -> Layer:
    assert sight.spans is not None
    rows, columns = sight.spans
    return Layer(
        name,
        kind,
        kernel,
        stride,
        padding,
        dilation,
        size=(rows.size, columns.size),
        jump=(rows.jump, columns.jump),
        field=(rows.last - rows.first + 1, columns.last - columns.first + 1),
        start=((rows.first + rows.last) / 2, (columns.first + columns.last) / 2),
        whole=sight.whole,
    )
