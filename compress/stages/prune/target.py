"""The target of pruning, in the user's measures, and the number of blocks that reach it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn

from compress import cost
from compress.config import Prune
from compress.errors import StageError, TargetError
from compress.stages.prune.channels import Block, dependency_graph, remove
from students.lightcap import LightCap
from students.lightcap.shapes import shapes_of

RETURNS = 12
TIMED = 15  # captions that a time is the median of


@dataclass(frozen=True)
class Aim:
    """`wanted` of what `measure` gives, which was `before` for the parent."""

    name: str
    measure: Callable[[LightCap], float]
    before: float
    wanted: float

    @staticmethod
    def of(name: str, config: Prune, model: LightCap) -> Aim:
        """StageError where it is not below what the parent already has."""
        measure = Clock.beside(model) if name == "ms" else COUNTS[name]
        before = measure(model)
        wanted = getattr(config, name) * (1 if name in ("mb", "ms") else before)
        if wanted >= before:
            raise StageError(f"prune to {name}: {wanted:.4g} is not below the parent's {before:.4g}")
        return Aim(name, measure, before, wanted)

    def at(self, share: float) -> float:
        """The value to reach after this share of the way."""
        return self.before + (self.wanted - self.before) * share

    def describe(self, model: LightCap) -> str:
        now = self.measure(model)
        return f"{self.name} {now:.4g}, {now / self.before:.3f} of the parent's {self.before:.4g}"


@dataclass(frozen=True)
class Target:
    """One aim or several, of which all are to be met. `savings`: what one channel of each unit saves, as a share of what is to go; of
    several aims, their sum."""

    aims: tuple[Aim, ...]
    savings: dict[tuple[str, str], float]

    @staticmethod
    def of(config: Prune, model: LightCap) -> Target:
        aims = tuple(Aim.of(name, config, model) for name in (*COUNTS, "ms") if getattr(config, name) is not None)
        return Target(aims, {}).of_what_is_left(model)

    def of_what_is_left(self, model: LightCap) -> Target:
        """The same target, with what channels of `model` save."""
        found: dict[tuple[str, str], float] = {}
        for aim in self.aims:
            as_macs = aim.name in ("macs", "ms")
            goes = (macs(model) if as_macs else parameters(model)) * (1 - aim.wanted / aim.before)
            for unit, saving in savings(model, as_macs).items():
                found[unit] = found.get(unit, 0.0) + saving / goes
        return dataclasses.replace(self, savings=found)

    @property
    def exact(self) -> bool:
        """Whether all measures are counts, and none a time that is another one when it is asked again."""
        return all(aim.name != "ms" for aim in self.aims)

    def missed(self, model: LightCap, share: float) -> Aim | None:
        """The first aim that `model` does not reach after `share` of the way."""
        return next((aim for aim in self.aims if aim.measure(model) > aim.at(share)), None)

    def describe(self, model: LightCap) -> str:
        return "; ".join(aim.describe(model) for aim in self.aims)


def choose(model: LightCap, order: Sequence[Block], target: Target, share: float = 1.0) -> int:
    """The least number of leading blocks without which the target is met after `share` of the way, by bisection over exact counts."""
    least = remove(model, order)
    if (aim := target.missed(least, share)) is not None:
        raise TargetError(
            f"prune: {aim.name} {aim.at(share):.4g} cannot be reached; with every removable block gone it is {aim.measure(least):.4g}; "
            "ask for less, or allow more parts"
        )
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if target.missed(remove(model, order[:middle]), share):
            low = middle
        else:
            high = middle
    return high


def give_back(model: LightCap, chosen: Sequence[Block], target: Target, share: float = 1.0) -> list[Block]:
    """`chosen` without those blocks that the target did not need: the last block may save far more than what was still missing. A unit's
    last block alone may return, the most important first; RETURNS are tried, since each is an exact count."""
    kept, tried = list(chosen), 0
    for index in range(len(kept) - 2, -1, -1):
        if tried == RETURNS:
            break
        if any(later.unit == kept[index].unit for later in kept[index + 1 :]):
            continue
        tried += 1
        rest = kept[:index] + kept[index + 1 :]
        if not target.missed(remove(model, rest), share):
            kept = rest
    return kept


@dataclass(frozen=True)
class Clock:
    """Milliseconds of one caption, as in a float model's row (PyTorch, one thread, beam 1, median) but for resizing the picture and
    spelling the text. Taken in turn with a copy of the parent, whose time when the clock was made is `reference`: a machine that is slower
    now is slower for both."""

    parent: LightCap
    reference: float

    @staticmethod
    def beside(parent: LightCap) -> Clock:
        parent = copy.deepcopy(parent).eval()
        return Clock(parent, Clock(parent, 1.0).times(parent)[0])

    def times(self, model: LightCap) -> tuple[float, float]:
        """Milliseconds of `model` and of the parent."""
        pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
        works = [lambda turn, timed=timed: cost.generate(timed, pixels, 0) for timed in (model.eval(), self.parent)]
        with cost.one_thread():
            mine, theirs = (cost.quantiles(times)["p50"] for times in cost.interleaved(works, TIMED))
        return mine, theirs

    def __call__(self, model: LightCap) -> float:
        mine, theirs = self.times(model)
        return mine * self.reference / theirs


def macs(model: LightCap) -> float:
    return float(cost.count_macs(dataclasses.replace(model.config, shapes=shapes_of(model))).caption)


def parameters(model: LightCap) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def megabytes(model: LightCap) -> float:
    """Float32 weights and buffers on disk, x 1e-6."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6


COUNTS: dict[str, Callable[[LightCap], float]] = {"macs": macs, "params": parameters, "mb": megabytes}


def savings(model: LightCap, as_macs: bool) -> dict[tuple[str, str], float]:
    """What one channel of each unit costs where it is written, transformed and read. With `as_macs`, times the places it is computed at:
    pixels of the map, or the tokens of prefix and caption (in the last layer the prefix has keys and values alone); a head's include its
    attention's own products."""
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
                weights = conv.weight.numel() * (places[conv] if as_macs else 1)
                total += weights / (conv.in_channels if handler == tp.prune_conv_in_channels else conv.out_channels)
        found["conv", f"encoder.{name}"] = total
    hidden, prefix = model.config.hidden, model.config.prefix
    for index, layer in enumerate(model.fusion.layers):
        last = index + 1 == len(model.fusion.layers)
        asked = cost.TOKENS + (0 if last else prefix) if as_macs else 1
        seen = cost.TOKENS + prefix if as_macs else 1
        found["ffn", f"fusion.layers.{index}"] = 2.0 * hidden * asked
        pairs = (0 if last else prefix**2) + sum(prefix + t for t in range(1, cost.TOKENS + 1)) if as_macs else 0
        found["head", f"fusion.layers.{index}"] = 2.0 * layer.head_dim * (hidden * (asked + seen) + pairs)
    return found
