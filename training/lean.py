"""The same bits in less memory: what is cheap to compute again is not kept for the backward pass.

Between two convolutions of a residual block PyTorch keeps three tensors of a picture's size: what the normalisation
reads, what the SiLU reads and what the convolution reads. The last two follow from the first, for little work. Here
they are computed again when the gradient comes; the convolution itself is not. The same goes for GEGLU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WORTH_IT = 2**18  # numbers in a tensor; for fewer the detour takes longer than the computing


class Lean:
    """A context in which the residual blocks and gated units of ``nets`` keep less; after it they are as before."""

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        self.modules: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        for module in (module for net in nets for module in net.modules()):
            if type(module) is ResnetBlock2D and _fits(module):
                self.modules.append((module, ResnetBlock2D, LeanResnet))
            elif type(module) is GEGLU:
                self.modules.append((module, GEGLU, LeanGEGLU))

    def __enter__(self) -> Self:
        for module, _, lean in self.modules:
            module.__class__ = lean
        return self

    def __exit__(self, *exc: object) -> None:
        for module, plain, _ in self.modules:
            module.__class__ = plain


def _fits(block: ResnetBlock2D) -> bool:
    """Whether a block is the plain one of Stable Diffusion, and nothing looks into its layers."""
    norms, convs = (block.norm1, block.norm2), (block.conv1, block.conv2)
    return (
        all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)
        and all(type(conv) is nn.Conv2d and conv.bias is not None for conv in convs)
        and all(conv.padding_mode == "zeros" and not isinstance(conv.padding, str) for conv in convs)
        and not any(
            layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
            for layer in (*norms, *convs, block.nonlinearity, block.dropout)
        )
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )


class LeanResnet(ResnetBlock2D):
    """diffusers' residual block on :class:`NormSiluConv`."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = _norm_silu_conv(self.norm1, self.conv1, input_tensor)
        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = _norm_silu_conv(self.norm2, self.conv2, hidden)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
        return input_tensor + hidden


class LeanGEGLU(GEGLU):
    """diffusers' gated unit on :class:`Gate`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        both = self.proj(hidden_states)
        return _gated(both) if both.numel() < WORTH_IT else cast(Tensor, Gate.apply(both))


def _norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    if x.numel() < WORTH_IT:
        return cast(Tensor, conv(F.silu(norm(x))))
    return cast(Tensor, NormSiluConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm, conv))


class NormSiluConv(torch.autograd.Function):
    """conv(silu(norm(x))) for x (B, C, h, w), of which x alone is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, norm: nn.GroupNorm,
        conv: nn.Conv2d,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gain, shift, weight)
        ctx.norm, ctx.conv, ctx.autocast = norm, conv, _autocast(x)
        s = F.silu(F.group_norm(x, norm.num_groups, gain, shift, norm.eps))
        return F.conv2d(s, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), norm, conv, needs = grads, ctx.norm, ctx.conv, ctx.needs_input_grad
        *inputs, weight = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            x, gain, shift = (t.detach().requires_grad_(need) for t, need in zip(inputs, needs[:3], strict=True))
            s = F.silu(F.group_norm(x, norm.num_groups, gain, shift, norm.eps))
        grad_s, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, s.detach().to(grad.dtype), weight.to(grad.dtype), list(conv.bias.shape), conv.stride, conv.padding,
            conv.dilation, False, [0, 0], conv.groups, (any(needs[:3]), needs[3], needs[4]),
        )  # fmt: skip
        wanted = [t for t in (x, gain, shift) if t.requires_grad]
        found = iter(torch.autograd.grad(s, wanted, grad_s.to(s.dtype)) if wanted else ())
        of_conv = [g if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return (*(next(found) if need else None for need in needs[:3]), *of_conv, None, None)


class Gate(torch.autograd.Function):
    """a · gelu(b) for (…, 2d) = [a, b] (2002.05202), of which a and b alone are kept."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        ctx.autocast = _autocast(both)
        return _gated(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            both = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(_gated(both), both, grads)[0]


def _gated(both: Tensor) -> Tensor:
    a, b = both.chunk(2, dim=-1)
    return a * F.gelu(b)


def _autocast(x: Tensor) -> dict[str, Any]:
    """The arguments of ``torch.autocast`` that hold now, for the backward pass to compute what the forward pass did."""
    kind = x.device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
    }
