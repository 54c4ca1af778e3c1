"""Float functions as ONNX Runtime's CPU kernels compute them: the polynomials and the order of operations of MLAS (onnxruntime 1.32, x86
with FMA). There they are equal to the last bit (norms from 8 numbers up); elsewhere, as PyTorch's own are, to some units in it.

Before a rounding to 8 bits a last bit decides, rarely, to which side a number goes. But a caption's prefix is rounded many times, and one
number that went elsewhere takes others along in every layer behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 8  # float32 in a register
LOG2E, LOG2_HIGH, LOG2_LOW = 1.4426950408889634, 6.93145752e-1, 1.42860677e-6
TO_INTEGER = 1.5 * 2**23  # added to a float32, rounds it
# Coefficients from the highest power down.
EXP = 1.37805939e-3, 8.37312452e-3, 4.16695364e-2, 1.66664720e-1, 4.99999851e-1, 1.0, 1.0
EXP_OF_ERF = 1.38319808e-3, 8.37550033e-3, 4.16689515e-2, 1.66664466e-1, 4.99999851e-1, 1.0, 1.0
ERF_SMALL = -5.99104969e-4, 4.99339588e-3, -2.67667342e-2, 1.12818025e-1, -3.76124859e-1, 1.28379151e-1  # up to ERF_SPLIT
ERF_LARGE = 1.72948930e-5, -3.83208680e-4, 3.88393435e-3, -2.42545605e-2, 1.06777847e-1, 6.34846687e-1, 1.28717512e-1
ERF_SPLIT, ERF_ONE = 0.921875, 3.925
SIGMOID_OVER = 4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01
SIGMOID_UNDER = (6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01,
                 9.93151921023180e-01)
SIGMOID_ONE = 18.0


def fused(x: Tensor | float, y: Tensor | float, z: Tensor | float) -> Tensor:
    """x * y + z, rounded once to float32. (Of two float32 the product is exact in float64.)"""
    x, y, z = (torch.as_tensor(value, dtype=torch.float32).double() for value in (x, y, z))
    return (x * y + z).float()


def polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = fused(total, x, coefficient)
    return total


def exp(x: Tensor, coefficients: tuple[float, ...] = EXP) -> Tensor:
    """Of what is not above 0."""
    x = x.clamp_min(-103.9720840454)
    powers = fused(x, LOG2E, TO_INTEGER) - TO_INTEGER
    rest = fused(powers, -LOG2_LOW, fused(powers, -LOG2_HIGH, x))
    return torch.ldexp(polynomial(rest, coefficients), powers)


def erf(x: Tensor) -> Tensor:
    size = x.abs().clamp_max(ERF_ONE)
    small = fused(polynomial(size * size, ERF_SMALL), size, size)
    large = 1 - exp(-fused(polynomial(size, ERF_LARGE), size, size), EXP_OF_ERF)
    return torch.where(x.abs() > ERF_SPLIT, large, small).copysign(x)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + erf(x * torch.tensor(0.5).sqrt()))


def sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(-SIGMOID_ONE, SIGMOID_ONE)
    square = x * x
    return (polynomial(square, SIGMOID_OVER) * x / polynomial(square, SIGMOID_UNDER) + 0.5).clamp(0, 1)


def layer_norm(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float, *_) -> Tensor:
    """aten::layer_norm over the last axis."""
    centred = x - x.double().mean(-1, keepdim=True).float()
    full = shape[0] // LANES * LANES
    squares = torch.zeros(*x.shape[:-1], LANES)
    for part in centred[..., :full].split(LANES, -1):
        squares = fused(part, part, squares)
    while squares.shape[-1] > 1:  # halves
        left, right = squares.chunk(2, -1)
        squares = left + right
    for place in range(full, shape[0]):
        squares = squares + centred[..., place : place + 1].square()
    deviation = torch.sqrt((squares / shape[0] + eps).double()).float()  # MKL's root of a float32 is not always the nearest
    return fused(centred * (1 / deviation), weight, bias)


def softmax(x: Tensor) -> Tensor:
    """Over the last axis. A register of AVX-512 is two of LANES: they add to two sums in turn."""
    powers = exp(x - x.amax(-1, keepdim=True)).masked_fill(x == -torch.inf, 0.0)
    sums = [torch.zeros(*x.shape[:-1], LANES)] * (2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1)
    for index, part in enumerate(F.pad(powers, (0, -x.shape[-1] % LANES)).split(LANES, -1)):
        sums[index % len(sums)] = sums[index % len(sums)] + part
    total = sum(sums[1:], sums[0])
    while total.shape[-1] > 1:  # neighbours
        total = total[..., 0::2] + total[..., 1::2]
    return powers * (1 / total)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: int) -> Tensor:
    """aten::scaled_dot_product_attention as `export.decoder.step_graph` spells it: what `prefix` gives, and what the caption."""
    scores = query @ key.transpose(2, 3) * torch.tensor(query.shape[-1] ** -0.5)
    weights = softmax(scores.masked_fill(~mask, -torch.inf))
    return weights[..., :prefix] @ value[:, :, :prefix] + weights[..., prefix:] @ value[:, :, prefix:]
