"""What a model takes, in the measures that pruning aims at, and what one channel of each unit saves there."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compress import cost
from compress.stages.prune.channels import dependency_graph
from students.lightcap import LightCap
from students.lightcap.shapes import shapes_of

TIMED = 15  # captions that a time is the median of
LEAST_STEPS = 0.01  # of a caption's time: a noisy clock may leave them none


@dataclass(frozen=True)
class Price:
    """What a multiply-accumulate takes in the encoder, in the prefix, and in a step; or else, what a weight takes, wherever it is."""

    encoder: float = 0.0
    prefix: float = 0.0
    step: float = 0.0
    weight: float = 0.0


@dataclass(frozen=True)
class Clock:
    """Milliseconds of one caption, as in a float model's row (PyTorch, one thread, beam 1, median) but for resizing the picture and
    spelling the text. Taken in turn with a copy of the parent, whose time when the clock was made is `reference`: a machine that is slower
    now is slower for both."""

    parent: LightCap
    reference: float
    price: Price

    @staticmethod
    def beside(parent: LightCap) -> Clock:
        """Prices are the parent's times by part over its MACs there: a step reads every weight for one token, so that its MACs take many
        times as long as the encoder's."""
        parent = plain(parent)
        encoder, prefix, caption = times_by_part(parent)
        counted, steps = counted_macs(parent), max(caption - encoder - prefix, LEAST_STEPS * caption)
        price = Price(encoder / counted.encoder, prefix / (counted.concepts + counted.prefix), steps / counted.steps)
        return Clock(parent, caption, price)

    def times(self, model: LightCap) -> tuple[float, float]:
        """Milliseconds of `model` and of the parent."""
        pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
        works = [lambda turn, timed=timed: cost.generate(timed, pixels, 0) for timed in (plain(model), self.parent)]
        with cost.one_thread():
            mine, theirs = (cost.quantiles(times)["p50"] for times in cost.interleaved(works, TIMED))
        return mine, theirs

    def __call__(self, model: LightCap) -> float:
        mine, theirs = self.times(model)
        return mine * self.reference / theirs


def plain(model: LightCap) -> LightCap:
    """A copy in the row-major memory that an artifact is read into: training's channels-last is faster, and not what will be timed."""
    return copy.deepcopy(model).eval().contiguous_()


@torch.inference_mode()
def times_by_part(model: LightCap) -> tuple[float, float, float]:
    """Milliseconds of the encoder, of the prefix (concepts included), and of the whole caption."""
    pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    grid = model.encode(pixels)
    works = [lambda _: model.encode(pixels), lambda _: model.prefill(grid), lambda _: cost.generate(model, pixels, 0)]
    with cost.one_thread():
        encoder, prefix, caption = (cost.quantiles(times)["p50"] for times in cost.interleaved(works, TIMED))
    return encoder, prefix, caption


def counted_macs(model: LightCap) -> cost.Macs:
    return cost.count_macs(dataclasses.replace(model.config, shapes=shapes_of(model)))


def macs(model: LightCap) -> float:
    return float(counted_macs(model).caption)


def parameters(model: LightCap) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def shapes_megabytes(model: LightCap) -> float:
    """What config.json grows by at most: it lists the shape of every module that is cut."""
    shapes = {name: list(m.weight.shape) for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    return len(json.dumps(shapes, indent=2)) / 1e6


def megabytes(model: LightCap, beside: float = 0.0) -> float:
    """Float32 weights and buffers on disk, x 1e-6, and what stands beside them."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6 + beside


COUNTS: dict[str, Callable[[LightCap], float]] = {"macs": macs, "params": parameters, "mb": megabytes}
PRICES = {"macs": Price(1.0, 1.0, 1.0), "params": Price(weight=1.0), "mb": Price(weight=4e-6)}


def savings(model: LightCap, price: Price) -> dict[tuple[str, str], float]:
    """What one channel of each unit costs where it is written, transformed and read: its weights, and their products at all places that
    they are computed at: pixels of the map, or the tokens of prefix and caption (in the last layer the prefix has keys and values alone);
    a head's include its attention's own products. A step of masked pieces reads [MASK] beside its token, and says one piece."""
    found: dict[tuple[str, str], float] = {}
    places: dict[nn.Module, float] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, out: places.__setitem__(module, float(out.shape[-2] * out.shape[-1])))
        for module in model.encoder.modules() if isinstance(module, nn.Conv2d)
    ]
    size = model.config.image_size
    with torch.no_grad():
        model.encoder.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    graph = dependency_graph(model)
    for name, module in model.encoder.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        total = 0.0
        group = graph.get_pruning_group(module, tp.prune_conv_out_channels, [0])
        for conv, handler in dict.fromkeys((d.target.module, d.handler) for d, _ in group):
            if isinstance(conv, nn.Conv2d):
                weights = conv.weight.numel() / (conv.in_channels if handler == tp.prune_conv_in_channels else conv.out_channels)
                total += weights * (price.encoder * places[conv] + price.weight)
        found["conv", f"encoder.{name}"] = total
    if model.concepts is not None:
        regions, cells = model.windows.shape
        grid, text = model.alignment.first.in_features, model.alignment.second.out_features
        found["concept", "alignment"] = price.prefix * (cells * grid + regions * (cells + text)) + price.weight * (grid + 1 + text)
    hidden, prefix = model.word.shape[1], model.config.prefix
    found["hidden", "fusion"] = outside_layers(model, price, price.step * cost.TOKENS + price.weight)
    read = 1 if model.config.mask_piece is None else 2
    steps = price.step * read * cost.TOKENS + price.weight
    pairs = price.step * read * sum(prefix + t + read for t in range(cost.TOKENS))
    for index, layer in enumerate(model.fusion.layers):
        last = index + 1 == len(model.fusion.layers)
        before = price.prefix * prefix
        asked = steps + (0 if last else before)
        among = pairs + (0 if last else before * prefix)
        found["ffn", f"fusion.layers.{index}"] = 2.0 * hidden * asked
        found["head", f"fusion.layers.{index}"] = 2.0 * layer.head_dim * (hidden * (asked + steps + before) + among)
        found["hidden", "fusion"] += 2 * layer.query.out_features * (asked + steps + before) + 2 * layer.up.out_features * asked
    return found


def outside_layers(model: LightCap, price: Price, steps: float) -> float:
    """What a hidden channel costs in embeddings, grid projection, modulator and heads."""
    config, fusion = model.config, model.fusion
    rows = len(model.word) * steps + (len(fusion.position.weight) + len(fusion.segment.weight)) * price.weight
    grid = fusion.grid.in_features * (price.prefix * config.grid**2 + price.weight)
    gates = 0 if model.modulator is None else model.modulator.down.out_features * (price.prefix * config.concepts + price.weight)
    return rows + grid + gates + len(model.heads.branches) * 2 * model.word.shape[1] * steps
