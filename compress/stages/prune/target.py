"""The target of pruning, in the user's measures, and the number of blocks that reach it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.config import Prune
from compress.errors import StageError, TargetError
from compress.stages.prune.channels import Block, Unit, blocks, remove
from compress.stages.prune.prices import COUNTS, PRICES, Clock, Price, megabytes, parameters, savings
from students.lightcap import LightCap

RETURNS = 12


@dataclass(frozen=True)
class Aim:
    """`wanted` of what `measure` gives, which was `before` for the parent. `price`: what a channel's parts take, in this measure's unit."""

    name: str
    measure: Callable[[LightCap], float]
    price: Price
    before: float
    wanted: float

    @staticmethod
    def of(name: str, config: Prune, model: LightCap, beside: float) -> Aim:
        if name == "ms":
            measure = Clock.beside(model)
            price = measure.price
        else:
            measure = functools.partial(megabytes, beside=beside) if name == "mb" else COUNTS[name]
            price = PRICES[name]
        before = measure(model)
        return Aim(name, measure, price, before, getattr(config, name) * (1 if name in ("mb", "ms") else before))

    def at(self, share: float) -> float:
        """The value to reach after this share of the way."""
        return self.before + (self.wanted - self.before) * share

    def describe(self, model: LightCap) -> str:
        now = self.measure(model)
        return f"{self.name} {now:.4g}, {now / self.before:.3f} of the parent's {self.before:.4g}"


@dataclass(frozen=True)
class Target:
    """One aim or several, of which all are to be met."""

    aims: tuple[Aim, ...]

    @staticmethod
    def of(config: Prune, model: LightCap, beside: float = 0.0) -> Target:
        """`beside`: megabytes on disk that are no weights, such as the tokenizer. Without aims, layers alone shall leave. StageError where
        the parent has all that is wanted."""
        aims = [Aim.of(name, config, model, beside) for name in (*COUNTS, "ms") if getattr(config, name) is not None]
        left = tuple(aim for aim in aims if aim.wanted < aim.before)
        if aims and not left:
            met = " and ".join(f"{aim.name}: {aim.wanted:.4g} is not below the parent's {aim.before:.4g}" for aim in aims)
            raise StageError(f"prune to {met}")
        return Target(left)

    def savings(self, model: LightCap) -> dict[tuple[str, str], float]:
        """What one channel of each unit of `model` saves, as a share of the way from the parent to the aim; of several aims, their sum."""
        found: dict[tuple[str, str], float] = {}
        for aim in self.aims:
            for unit, saving in savings(model, aim.price).items():
                found[unit] = found.get(unit, 0.0) + saving / (aim.before - aim.wanted)
        return found

    @property
    def exact(self) -> bool:
        """Whether all measures are counts, and none a time that is another one when it is asked again."""
        return all(aim.name != "ms" for aim in self.aims)

    def missed(self, model: LightCap, share: float) -> dict[Aim, float]:
        """The aims that `model` does not reach after `share` of the way, and what it measures there."""
        measured = ((aim, aim.measure(model)) for aim in self.aims)
        return {aim: value for aim, value in measured if value > aim.at(share)}

    def reached(self, model: LightCap, steps: int, of: int) -> dict:
        """What is to be known of a model that has `steps` of the way's `of` behind it: whether they are all, and each measure."""
        measures = {aim.name: {"parent": aim.before, "wanted": aim.wanted, "reached": aim.measure(model)} for aim in self.aims}
        return {"target": "met" if steps == of else "not met", "steps": steps, "of": of} | measures

    def describe(self, model: LightCap) -> str:
        return "; ".join(aim.describe(model) for aim in self.aims) or f"{parameters(model):,.0f} parameters"


def ranked(model: LightCap, scores: Mapping[Unit, Tensor], round_to: int, target: Target, share: float = 1.0) -> list[Block]:
    """Every removable block in the order in which they leave: by importance over what they save. Of several aims those count that `model`
    misses after `share` of the way, and once one is met, the rest is ranked by what the others still miss."""
    first: list[Block] = []

    def missed(count: int, rest: Sequence[Block]) -> tuple[Aim, ...]:
        return tuple(target.missed(remove(model, [*first, *rest[:count]]), share))

    while True:
        aims = missed(0, ())
        saved, taken = Target(aims or target.aims).savings(model), {(block.unit, block.channels) for block in first}
        rest = [block for block in blocks(scores, round_to, saved) if (block.unit, block.channels) not in taken]
        if len(aims) < 2 or missed(len(rest), rest):
            return first + rest
        first.extend(rest[: least(len(rest), lambda count, rest=rest, aims=aims: len(missed(count, rest)) < len(aims))])


def least(count: int, enough: Callable[[int], bool]) -> int:
    """The least number up to `count`, which is enough, that is, by bisection: none is not."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def choose(model: LightCap, order: Sequence[Block], target: Target, share: float = 1.0) -> int:
    """The least number of leading blocks without which the target is met after `share` of the way, by bisection over exact counts.
    TargetError where the whole way is too far, whatever share is asked for."""
    for aim, left in target.missed(remove(model, order), 1.0).items():
        raise TargetError(f"prune: {aim.name} {aim.wanted:.4g} cannot be reached; with every removable block gone it is {left:.4g}; "
                          "ask for less, or allow more parts or a smaller round_to")
    return least(len(order), lambda count: not target.missed(remove(model, order[:count]), share))


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
