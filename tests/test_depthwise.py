"""Depthwise convolutions: values against TensorFlow's padding in timm, gradients against fp32 autograd."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from students.lightcap.depthwise import DepthwiseConv2d, missing


@pytest.mark.parametrize("size", [7, 14, 15])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_bf16_are_those_of_fp32(size, kernel, stride):
    """As near as bf16's eight bits allow, in channels last, for the input and the weight."""
    torch.manual_seed(0)
    padding = 0 if stride > 1 else kernel // 2
    mine = DepthwiseConv2d(6, 6, kernel, stride=stride, padding=padding, groups=6, bias=False)
    x = torch.randn(3, 6, size, size).to(memory_format=torch.channels_last)
    along = None
    found = []
    for autocast in (True, False):
        at = x.clone().requires_grad_()
        mine.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = mine(at)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert ("_Depthwise" in type(y.grad_fn).__name__) == autocast
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if along is None else along
        (y.float() * along).sum().backward()
        found.append((y.detach().float(), at.grad, mine.weight.grad.clone()))
    for bf16, fp32 in zip(*found, strict=True):
        assert bf16.dtype == fp32.dtype == torch.float32
        assert (bf16 - fp32).norm() < 0.01 * fp32.norm()


@pytest.mark.parametrize("size", [6, 7, 112])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_stride_pads_as_tensorflow_does(size, kernel):
    theirs = Conv2dSame(4, 4, kernel, stride=2, groups=4, bias=False)
    mine = DepthwiseConv2d(4, 4, kernel, stride=2, groups=4, bias=False)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, size, size + 1)
    assert torch.equal(mine(x), theirs(x))
    assert mine(x).shape[2:] == (-(-size // 2), -(-(size + 1) // 2))


def test_missing_places():
    assert missing(112, 3, 2) == (0, 1) and missing(7, 5, 2) == (2, 2) and missing(2, 1, 2) == (0, 0)


def test_a_frozen_weight_costs_no_gradient():
    mine = DepthwiseConv2d(4, 4, 5, padding=2, groups=4, bias=False).requires_grad_(False)
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mine(x).float().sum().backward()
    assert mine.weight.grad is None
    wanted = F.conv_transpose2d(torch.ones(1, 4, 9, 9), mine.weight, padding=2, groups=4)
    torch.testing.assert_close(x.grad, wanted, atol=0.05, rtol=0.02)


def test_it_is_a_convolution_to_those_who_ask():
    assert isinstance(DepthwiseConv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d)
