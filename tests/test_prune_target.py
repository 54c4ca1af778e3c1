"""The target of pruning is met and not overshot, in each measure of the user's."""

import dataclasses
import importlib

import pytest
import torch
from prunable import build, ranked, with_concepts

from compress import cost
from compress.artifact import Artifact
from compress.config import Prune
from compress.errors import StageError, TargetError
from compress.stages import prune
from compress.stages.prune import channels, prices, sensitivity, target
from students.lightcap import LightCap

importance = importlib.import_module("compress.stages.prune.importance")  # the package names its function alike


@pytest.mark.parametrize("wanted", [{"macs": 0.7}, {"params": 0.8}, {"mb": 1.6}, {"macs": 0.8, "mb": 1.4}])
def test_the_target_is_reached_and_not_overshot(wanted):
    model = build()
    goal = target.Target.of(Prune(**wanted), model)
    order = ranked(model)
    count = target.choose(model, order, goal)
    enough, fewer = (channels.remove(model, order[:blocks]) for blocks in (count, count - 1))
    assert [aim.name for aim in goal.aims] == list(wanted)
    assert all(aim.measure(enough) <= aim.wanted for aim in goal.aims) and any(aim.measure(fewer) > aim.wanted for aim in goal.aims)
    for aim in goal.aims:
        assert aim.wanted == pytest.approx(wanted[aim.name] if aim.name == "mb" else wanted[aim.name] * aim.before)
        assert aim.at(0.5) == pytest.approx((aim.before + aim.wanted) / 2) and aim.at(1.0) == pytest.approx(aim.wanted)


def test_megabytes_are_of_the_whole_artifact():
    """What is beside the weights stays, so more of them must leave."""
    model = build()
    alone, beside = (target.Target.of(Prune(mb=1.6), model, beside=extra) for extra in (0.0, 0.1))
    [aim] = beside.aims
    assert aim.before == pytest.approx(prices.megabytes(model) + 0.1)
    smaller = channels.remove(model, ranked(model)[: target.choose(model, ranked(model), beside)])
    assert prices.megabytes(smaller) <= 1.5 and not alone.missed(smaller, 1.0)


def test_of_two_aims_each_counts_by_its_share_of_the_way_until_it_is_met():
    """A channel's saving in MACs over those that shall go, and in parameters over those; what is met already, or here by layers, is left
    out, and what is met on the way ranks no block behind it."""
    model = build()
    wanted = {"macs": 0.7, "params": 0.5}, {"macs": 0.7}, {"params": 0.5}
    both, one, other = (target.Target.of(Prune(**aims), model) for aims in wanted)
    key = "conv", channels.units(model, ("encoder",))[2].name
    assert one.savings(model)[key] == pytest.approx(prices.savings(model, prices.PRICES["macs"])[key] / (0.3 * prices.macs(model)))
    assert both.savings(model)[key] == pytest.approx(one.savings(model)[key] + other.savings(model)[key])
    assert target.Target.of(Prune(macs=0.7, mb=99.0), model).savings(model) == one.savings(model)

    source = torch.Generator().manual_seed(5)
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, ("encoder", "fusion"))}

    def by(aims: target.Target) -> list[tuple]:
        return [(block.unit, block.channels) for block in channels.blocks(scores, 8, aims.savings(model))]

    order = target.ranked(model, scores, 8, both)
    named = [(block.unit, block.channels) for block in order]
    first = next(count for count in range(len(order)) if len(both.missed(channels.remove(model, order[:count]), 1.0)) < 2)
    [open_aim] = both.missed(channels.remove(model, order[:first]), 1.0)
    assert first > 0 and named[:first] == by(both)[:first] != by(both) and sorted(map(str, named)) == sorted(map(str, by(both)))
    assert named[first:] == [name for name in by(target.Target((open_aim,))) if name not in named[:first]] != by(both)[first:]
    assert target.ranked(model, scores, 8, one) == channels.blocks(scores, 8, one.savings(model))

    shorter = sensitivity.with_layers(model, [0])
    goal = target.Target.of(Prune(macs=0.7, params=0.985), model)
    assert [aim.name for aim in goal.missed(shorter, 1.0)] == ["macs"]
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(shorter, ("encoder", "fusion"))}
    assert target.ranked(shorter, scores, 8, goal) == channels.blocks(scores, 8, one.savings(shorter))


def test_megabytes_are_those_on_disk(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert prices.megabytes(model) == pytest.approx((tmp_path / "model.safetensors").stat().st_size / 1e6, rel=0.02)


def test_macs_of_a_model_are_those_of_its_config():
    model = build()
    smaller = channels.remove(model, ranked(model)[:9])
    assert prices.macs(model) == cost.count_macs(model.config).caption > prices.macs(smaller)


@pytest.mark.parametrize("mask_piece", [None, 4])
def test_savings_are_what_a_channel_costs(mask_piece):
    """One channel of each unit removed: the exact counts fall by what `savings` says, also where a step reads [MASK] beside its token."""
    model = with_concepts(build())
    model.config = dataclasses.replace(model.config, mask_piece=mask_piece)

    for name, measure in prices.COUNTS.items():
        said, whole = prices.savings(model, prices.PRICES[name]), measure(model)
        units = channels.units(model, ("encoder", "fusion", "concepts", "hidden"))
        for unit in units if name != "macs" else [units[1], units[3], units[5], units[6], *units[-3:]]:
            fell = whole - measure(channels.remove(model, [channels.Block(unit, (0,), 0.0)]))
            assert fell == pytest.approx(said[unit.kind, unit.name], rel=0.05), (name, unit)


def test_a_model_is_timed_as_its_artifact_will_be(monkeypatch):
    """Importance and repair leave the encoder's weights in channels-last memory, which is faster."""
    model, seen, generate = build(), [], cost.generate
    model.encoder.to(memory_format=torch.channels_last)
    strided = [name for name, weight in model.named_parameters() if not weight.is_contiguous()]
    monkeypatch.setattr(prices, "TIMED", 2)
    monkeypatch.setattr(cost, "generate", lambda timed, *more: seen.append(timed) or generate(timed, *more))
    prices.Clock.beside(model).times(model)
    assert strided and len({id(timed) for timed in seen}) == 2
    for timed in seen:
        weights = dict(timed.named_parameters())
        assert all(weights[name].is_contiguous() and torch.equal(weights[name], weight) for name, weight in model.named_parameters())
    assert strided == [name for name, weight in model.named_parameters() if not weight.is_contiguous()]


def test_steps_have_a_price_where_a_noisy_clock_leaves_them_none(monkeypatch):
    monkeypatch.setattr(prices, "times_by_part", lambda model: (6.0, 5.0, 10.0))
    assert prices.Clock.beside(build()).price.step > 0


def test_impossible_targets_are_one_line(monkeypatch):
    model = build()
    goal = target.Target.of(Prune(params=0.9, macs=0.01), model)
    with pytest.raises(StageError, match="prune: macs .* cannot be reached; with every .* gone it is .* smaller round_to") as raised:
        target.choose(model, ranked(model), goal)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 1
    with pytest.raises(StageError, match="prune to mb: 99 is not below the parent's"):
        target.Target.of(Prune(mb=99.0), model)
    with pytest.raises(StageError, match="prune to mb: 99 is not below the parent's .* and ms: 9000 is not below"):
        monkeypatch.setattr(prices, "times_by_part", lambda model: (5.0, 2.0, 10.0))
        target.Target.of(Prune(mb=99.0, ms=9000.0), model)


def test_a_target_out_of_reach_is_said_before_the_first_step(tmp_path):
    model = build()
    scores = {unit: torch.rand(unit.width) for unit in channels.units(model, ("fusion",))}
    with pytest.raises(TargetError, match="prune: macs .* cannot be reached; with every removable block gone it is"):
        prune.leaving(model, scores, 8, target.Target.of(Prune(macs=0.05), model), 0.01, tmp_path / "leaving-1.json")


def test_what_the_target_did_not_need_comes_back():
    """A last block that saves far more than what was missing lets earlier ones return, and the target still holds."""
    model = build()
    order = ranked(model)
    goal = target.Target.of(Prune(macs=0.7), model)
    chosen = order[: target.choose(model, order, goal)]
    kept = target.give_back(model, chosen, goal)
    assert set(kept) <= set(chosen) and not goal.missed(channels.remove(model, kept), 1.0)
    for block in kept:
        last_of_unit = [other for other in kept if other.unit == block.unit][-1] == block
        if last_of_unit and len(kept) <= target.RETURNS:
            rest = [other for other in kept if other != block]
            assert goal.missed(channels.remove(model, rest), 1.0)


# ---- milliseconds


def test_a_time_is_the_models_own_beside_its_parents(monkeypatch):
    """The parent is slowed down by half between two askings: a model of half its time is still at half of the first."""
    parent, small, speed = build(), build(), {"parent": 10.0, "small": 5.0}
    names = {}

    def interleaved(works, rounds):
        return [[speed[names[id(work.__defaults__[0])]]] * rounds for work in works]

    monkeypatch.setattr(cost, "interleaved", interleaved)
    monkeypatch.setattr(prices.copy, "deepcopy", lambda model: model)
    monkeypatch.setattr(prices, "times_by_part", lambda model: (5.0, 2.0, 10.0))
    names |= {id(parent): "parent", id(small): "small"}
    clock = prices.Clock.beside(parent)
    counted = cost.count_macs(parent.config)
    spent = (clock.price.encoder * counted.encoder, clock.price.prefix * counted.prefix, clock.price.step * counted.steps)
    assert spent == pytest.approx((5.0, 2.0, 3.0)) and clock.price.weight == 0
    assert (clock(parent), clock(small)) == (10.0, 5.0)
    speed.update(parent=15.0, small=7.5)
    assert (clock(parent), clock(small)) == (10.0, 5.0)


def test_a_target_in_milliseconds_takes_blocks_until_the_clock_says_so(pruning, monkeypatch):
    """With a clock that counts MACs, the stage ends where the target in MACs does, in the order of its prices; after a stop the clock is
    not asked again, and other prices change nothing."""
    model, _, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    before = prices.macs(model)
    price = prices.Price(1e-9, 1e-9, 50e-9)
    monkeypatch.setattr(prices.Clock, "beside", lambda parent: prices.Clock(parent, 20.0, price))
    monkeypatch.setattr(prices.Clock, "__call__", lambda self, timed: 20.0 * prices.macs(timed) / before)
    given = {"round_to": 4, "recover_epochs": 0.0, "recover_encoder_epochs": 0.0}
    here = context("a")
    prune.run(parent, Prune(ms=20 * 0.9, **given), here)
    assert 0.85 < prices.macs(LightCap.from_pretrained(here.output)) / before <= 0.9
    assert not target.Target.of(Prune(ms=15.0), model).exact and target.Target.of(Prune(macs=0.7), model).exact

    again = dataclasses.replace(here, output=here.output.parent / "again")
    monkeypatch.setattr(prune, "choose", None)
    monkeypatch.setattr(prices.Clock, "beside", lambda parent: prices.Clock(parent, 20.0, prices.Price(50e-9, 1e-9, 1e-9)))
    prune.run(parent, Prune(ms=20 * 0.9, **given), again)
    assert Artifact(again.output).digest() == Artifact(here.output).digest()
    with pytest.raises(StageError, match="prune to ms: 30 is not below the parent's 20"):
        target.Target.of(Prune(ms=30.0), model)
