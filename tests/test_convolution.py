"""The encoder's convolutions and ReLU6: values against TensorFlow's padding in timm, gradients against torch's own in double precision."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from students.lightcap import convolution
from students.lightcap.convolution import ClippedReLU, SameConv2d, missing


@pytest.mark.parametrize("size", [7, 14, 15])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("autocast", "near", "wide"), [(True, 0.01, False), (False, 1e-5, False), (False, 1e-5, True)])
def test_gradients_are_those_of_torch_in_double(size, kernel, stride, autocast, near, wide, monkeypatch):
    """As near as the precision allows, in channels last: for the input, the weight and a bias that is handed in."""
    monkeypatch.setattr(convolution, "WIDE", wide)
    torch.manual_seed(0)
    padding = 0 if stride > 1 else kernel // 2
    mine = SameConv2d(6, 6, kernel, stride=stride, padding=padding, groups=6, bias=False)
    given = [torch.randn(3, 6, size, size).to(memory_format=torch.channels_last), mine.weight.detach(), torch.randn(6)]
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mine._conv_forward(x, weight, bias)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32) and "_Convolution" in type(y.grad_fn).__name__
    along = torch.randn(y.shape)
    (y.float() * along).sum().backward()

    exact = [tensor.double().requires_grad_() for tensor in given]
    around = [*missing(size, kernel, 2), *missing(size, kernel, 2)] if stride > 1 else [padding] * 4
    wanted = F.conv2d(F.pad(exact[0], around), exact[1], exact[2], stride, groups=6)
    (wanted * along).sum().backward()
    pairs = [(y, wanted), *((own.grad, other.grad) for own, other in zip((x, weight, bias), exact, strict=True))]
    for found, right in pairs:
        assert (found.double() - right).norm() < near * right.norm()


@pytest.mark.parametrize(("kernel", "stride", "outputs"), [(1, 1, 4), (3, 2, 4), (1, 1, 1)])
def test_with_a_bias_in_fp32_so_are_those_of_other_convolutions(kernel, stride, outputs):
    """One with a single input channel (pruned so far) is not taken for a depthwise one."""
    torch.manual_seed(0)
    inputs = 1 if outputs == 4 and kernel == 1 else 6
    mine = SameConv2d(inputs, outputs, kernel, stride=stride, bias=True)
    x = torch.randn(3, inputs, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    y = mine(x)
    along = torch.randn(y.shape)
    assert "_Convolution" in type(y.grad_fn).__name__
    (y * along).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, mine.weight, mine.bias)]
    around = [*missing(9, kernel, stride), *missing(9, kernel, stride)]
    wanted = F.conv2d(F.pad(exact[0], around), exact[1], exact[2], stride)
    (wanted * along).sum().backward()
    for found, right in [(y, wanted), *((own.grad, other.grad) for own, other in zip((x, mine.weight, mine.bias), exact, strict=True))]:
        assert (found.double() - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_relu_is_torchs_in_place(dtype):
    values = torch.tensor([-1.0, -0.0, 0.0, 0.5, 5.9, 6.0, 6.1, 40.0], dtype=dtype)
    found = []
    for act in (ClippedReLU(), nn.ReLU6()):
        x = values.clone().requires_grad_()
        before = x * 1
        after = act(before)
        after.backward(torch.arange(1.0, 9).to(dtype))
        found.append((after.detach(), x.grad))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)
    given = values.clone()
    with torch.inference_mode():
        assert ClippedReLU()(given).data_ptr() == given.data_ptr() and torch.equal(given, found[0][0])
    with torch.no_grad():
        x = values.clone().requires_grad_() * 1
        assert torch.equal(ClippedReLU()(x), found[0][0])


@pytest.mark.parametrize("size", [6, 7, 112])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_stride_pads_as_tensorflow_does(size, kernel):
    theirs = Conv2dSame(4, 4, kernel, stride=2, groups=4, bias=False)
    mine = SameConv2d(4, 4, kernel, stride=2, groups=4, bias=False)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, size, size + 1)
    assert torch.equal(mine(x), theirs(x)) and torch.equal(SameConv2d._conv_forward(mine, x, mine.weight, None), theirs(x))
    assert mine(x).shape[2:] == (-(-size // 2), -(-(size + 1) // 2))


def test_missing_places():
    assert missing(112, 3, 2) == (0, 1) and missing(7, 5, 2) == (2, 2) and missing(2, 1, 2) == (0, 0)


def test_a_frozen_weight_costs_no_gradient():
    mine = SameConv2d(4, 4, 5, padding=2, groups=4, bias=False).requires_grad_(False)
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mine(x).float().sum().backward()
    assert mine.weight.grad is None
    wanted = F.conv_transpose2d(torch.ones(1, 4, 9, 9), mine.weight, padding=2, groups=4)
    torch.testing.assert_close(x.grad, wanted, atol=0.05, rtol=0.02)


def test_it_is_a_convolution_to_those_who_ask():
    assert isinstance(SameConv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d)


@pytest.mark.parametrize(
    ("kernel", "dtype", "wide", "quartered"),
    [(5, torch.float32, True, True), (5, torch.float32, False, False), (5, torch.bfloat16, False, True), (3, torch.float32, True, False)],
)
def test_which_kernels_are_put_together_from_quarters(kernel, dtype, wide, quartered, monkeypatch):
    monkeypatch.setattr(convolution, "WIDE", wide)
    asked = []
    monkeypatch.setattr(convolution, "quartered_weight_gradient", lambda *given: asked.append(given))
    x = torch.randn(1, 2, 9, 9, dtype=dtype)
    convolution.gradient_of_weight(torch.randn_like(x), x, kernel, 1, kernel // 2)
    assert bool(asked) == quartered
