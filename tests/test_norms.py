"""Norms of fixed statistics, folded while they are trained: the same function, the same gradients, the same names."""

import pytest
import torch
from torch import nn

from students.lightcap import LightCap, preset
from students.lightcap.norms import folded, read_by_norms


def encoder(name: str) -> tuple[nn.Module, int]:
    """In double precision, in eval mode, with norms that do something."""
    torch.manual_seed(1)
    model = LightCap(preset("tiny", encoder=name, vocabulary=40, image_size=64))
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.6, 1.4)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.encoder.double().eval(), 64


@pytest.fixture(autouse=True)
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "convolutions"), [("efficientnet-lite0", 49), ("resnet-small", 11), ("clip-rn50", 55)])
def test_values_and_gradients_are_those_of_the_norms(name, convolutions):
    """The number of convolutions by hand: each has a norm behind it."""
    whole, size = encoder(name)
    assert len(read_by_norms(whole, size)) == convolutions == sum(isinstance(m, nn.Conv2d) for m in whole.modules())
    x = torch.randn(2, 3, size, size)
    names = list(whole.state_dict())
    found = []
    for inside in (False, True):
        whole.zero_grad()
        if inside:
            with folded(whole, size):
                grid = whole(x)
                grid.square().mean().backward()
                assert list(whole.state_dict()) == names
        else:
            grid = whole(x)
            grid.square().mean().backward()
        found.append([grid.detach(), *(parameter.grad.clone() for parameter in whole.parameters())])
    for plain, fold in zip(*found, strict=True):
        assert (plain - fold).norm() <= 1e-9 * plain.norm()
    assert not any("forward" in vars(module) for module in whole.modules())


def test_norms_that_look_at_their_batch_stay():
    whole, size = encoder("resnet-small")
    whole.train()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    with folded(whole, size):
        assert not any("forward" in vars(module) for module in whole.modules())
    assert whole.training and all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_an_error_inside_leaves_the_encoder_as_it_was():
    whole, size = encoder("resnet-small")
    with pytest.raises(KeyError), folded(whole, size):
        raise KeyError
    assert not any("forward" in vars(module) for module in whole.modules())
