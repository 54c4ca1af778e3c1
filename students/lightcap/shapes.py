"""Pruned modules: their shapes as data, so that a pruned model is rebuilt from config.json and loads its weights strictly."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weight shape of every convolution, linear layer and norm, by module name."""
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


def changed_shapes(model: nn.Module, plain: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of `model` that differ from those of `plain`, the model as its config without `shapes` builds it."""
    before = shapes_of(plain)
    return {name: shape for name, shape in shapes_of(model).items() if shape != before[name]}


def reshape(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replaces each named module by one of the given weight shape, with fresh weights. ValueError for a name that is not there."""
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        if name not in modules:
            raise ValueError(f"config.json gives a shape for '{name}', which this architecture does not have")
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, resized(modules[name], shape))


def resized(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    if isinstance(module, nn.Linear):
        return nn.Linear(shape[1], shape[0], bias=module.bias is not None)
    if isinstance(module, nn.Embedding):
        return nn.Embedding(*shape)
    if isinstance(module, nn.LayerNorm):
        return nn.LayerNorm(shape[0], eps=module.eps)
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels and module.groups > 1
        groups = shape[0] if depthwise else module.groups
        return type(module)(
            shape[1] * groups, shape[0], module.kernel_size, stride=module.stride, padding=module.padding, dilation=module.dilation,
            groups=groups, bias=module.bias is not None,
        )
    return nn.BatchNorm2d(shape[0], module.eps, module.momentum)
