"""Depthwise convolutions: values against TensorFlow's padding in timm, gradients against torch's own in double precision."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from students.lightcap import depthwise
from students.lightcap.depthwise import DepthwiseConv2d, SameConv2d, missing


@pytest.mark.parametrize("size", [7, 14, 15])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("autocast", "near", "wide"), [(True, 0.01, False), (False, 1e-5, False), (False, 1e-5, True)])
def test_gradients_are_those_of_torch_in_double(size, kernel, stride, autocast, near, wide, monkeypatch):
    """As near as the precision allows, in channels last: for the input, the weight and a bias that is handed in."""
    monkeypatch.setattr(depthwise, "WIDE", wide)
    torch.manual_seed(0)
    padding = 0 if stride > 1 else kernel // 2
    mine = DepthwiseConv2d(6, 6, kernel, stride=stride, padding=padding, groups=6, bias=False)
    given = [torch.randn(3, 6, size, size).to(memory_format=torch.channels_last), mine.weight.detach(), torch.randn(6)]
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mine._conv_forward(x, weight, bias)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32) and "_Depthwise" in type(y.grad_fn).__name__
    along = torch.randn(y.shape)
    (y.float() * along).sum().backward()

    exact = [tensor.double().requires_grad_() for tensor in given]
    around = [*missing(size, kernel, 2), *missing(size, kernel, 2)] if stride > 1 else [padding] * 4
    wanted = F.conv2d(F.pad(exact[0], around), exact[1], exact[2], stride, groups=6)
    (wanted * along).sum().backward()
    pairs = [(y, wanted), *((own.grad, other.grad) for own, other in zip((x, weight, bias), exact, strict=True))]
    for found, right in pairs:
        assert (found.double() - right).norm() < near * right.norm()


@pytest.mark.parametrize("size", [6, 7, 112])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_stride_pads_as_tensorflow_does(size, kernel):
    theirs = Conv2dSame(4, 4, kernel, stride=2, groups=4, bias=False)
    mine = DepthwiseConv2d(4, 4, kernel, stride=2, groups=4, bias=False)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, size, size + 1)
    assert torch.equal(mine(x), theirs(x)) and torch.equal(SameConv2d._conv_forward(mine, x, mine.weight, None), theirs(x))
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


@pytest.mark.parametrize(
    ("kernel", "dtype", "wide", "quartered"),
    [(5, torch.float32, True, True), (5, torch.float32, False, False), (5, torch.bfloat16, False, True), (3, torch.float32, True, False)],
)
def test_which_kernels_are_put_together_from_quarters(kernel, dtype, wide, quartered, monkeypatch):
    monkeypatch.setattr(depthwise, "WIDE", wide)
    asked = []
    monkeypatch.setattr(depthwise, "quartered_weight_gradient", lambda *given: asked.append(given))
    x = torch.randn(1, 2, 9, 9, dtype=dtype)
    depthwise.gradient_of_weight(torch.randn_like(x), x, kernel, 1, kernel // 2)
    assert bool(asked) == quartered
