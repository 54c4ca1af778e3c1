"""EfficientNet's convolutions, padded as TensorFlow pads, and its ReLU6, with backward passes on a CPU that are not torch's own where those
are slow.

oneDNN (as torch 2.14 carries it) takes 15 to 60 ms in bf16 for a batch of 16 where a forward pass takes 1 or 2: in gradients of 5x5
depthwise kernels, and in gradients of the input of a strided depthwise convolution. In fp32 a bias costs some ms too many, and so does,
with AVX-512, the first. All can be had from kernels that are fast (benchmarks/convolution.py):

- the gradient of a 5x5 kernel is put together from those of four 3x3 kernels, at shifts of 0 and 2 of the padded input (not in
  fp32 without AVX-512, where oneDNN's own is faster than these);
- the gradient of a strided convolution's input is a convolution, of stride 1 with the kernel turned around, of the output's gradient with
  zeros between its places (in bf16 alone);
- the gradient of a bias is a sum;
- torch's ReLU6 in place is one out of place and a copy; clamping in place is neither.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST = torch.channels_last
WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


class SameConv2d(nn.Conv2d):
    """With a stride the input is padded as TensorFlow pads: to ceil(size / stride) outputs, more after. One kernel for all channels, or one
    for each (depthwise)."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding, kernel, stride = self.padding, self.kernel_size[0], self.stride[0]
        if stride > 1:
            x, padding = F.pad(x, [*missing(x.shape[3], kernel, stride), *missing(x.shape[2], kernel, stride)]), (0, 0)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        slow = self.groups > 1 or (bias is not None and dtype == torch.float32)
        if not (slow and backward_follows(x)):
            return F.conv2d(x, weight, bias, stride, padding, 1, self.groups)
        return _Convolution.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding[0])


class ClippedReLU(nn.ReLU6):
    """ReLU6; in place on a CPU, but where a graph is traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return _Clip.apply(x)


def missing(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Places to add before and after `size`, so that there are ceil(size / stride) outputs."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def backward_follows(x: Tensor) -> bool:
    """Whether a backward pass will follow, on a CPU."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, 1, x.shape[1] // weight.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=LAST)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if x.shape[1] == len(weight) and weight.shape[1] == 1:  # depthwise
            of_x = gradient_of_input(gradient, x, weight, ctx.stride, ctx.padding) if needs_x else None
            of_weight = gradient_of_weight(gradient, x, weight.shape[2], ctx.stride, ctx.padding) if needs_weight else None
        else:
            of_x, of_weight = gradients(gradient, x, weight, ctx.stride, ctx.padding, (needs_x, needs_weight))
        return of_x, of_weight, gradient.sum((0, 2, 3)) if needs_bias else None, None, None


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x.clamp_(0, 6)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        [clipped] = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, clipped, 0.0, 6.0)


def gradient_of_input(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    strided = stride > 1 and gradient.dtype == torch.bfloat16
    return (strided_input_gradient if strided else input_gradient)(gradient, x, weight, stride, padding)


def gradient_of_weight(gradient: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    quartered = kernel == 5 and (WIDE or gradient.dtype == torch.bfloat16)
    return (quartered_weight_gradient if quartered else weight_gradient)(gradient, x, kernel, stride, padding)


def gradients(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, asked: tuple[bool, bool]) -> list[Tensor | None]:
    """torch's own, of the input and of the weight, where `asked` for."""
    steps, pads = [stride, stride], [padding, padding]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, steps, pads, [1, 1], False, [0, 0], x.shape[1] // weight.shape[1], [*asked, False]
    )[:2]


def input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return gradients(gradient, x, weight, stride, padding, (True, False))[0]


def strided_input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """gradient (N, C, H', W') -> (N, C, H, W) as x."""
    n, channels, height, width = x.shape
    more = 2 * padding - weight.shape[2] + 1
    apart = torch.empty((n, channels, height + more, width + more), dtype=gradient.dtype, memory_format=LAST).zero_()
    apart[:, :, ::stride, ::stride][:, :, : gradient.shape[2], : gradient.shape[3]] = gradient
    return F.conv2d(apart, weight.flip(2, 3), None, 1, weight.shape[2] - 1 - padding, 1, channels)


def weight_gradient(gradient: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(C, 1, kernel, kernel)."""
    return gradients(gradient, x, gradient.new_empty(x.shape[1], 1, kernel, kernel), stride, padding, (False, True))[1]


def quartered_weight_gradient(gradient: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(C, 1, 5, 5); rows and columns 2 are in two quarters each, which agree."""
    x = F.pad(x, [padding] * 4)
    height, width = (stride * (size - 1) + 3 for size in gradient.shape[2:])
    whole = gradient.new_empty(x.shape[1], 1, kernel, kernel)
    for down in (0, 2):
        for across in (0, 2):
            seen = x[:, :, down : down + height, across : across + width].contiguous(memory_format=LAST)
            whole[:, :, down : down + 3, across : across + 3] = weight_gradient(gradient, seen, 3, stride, 0)
    return whole
