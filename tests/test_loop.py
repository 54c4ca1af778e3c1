"""The loop: bit by bit the same after a kill, its schedule, and its precision."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from compress.config import Optimisation
from compress.context import Progress
from compress.errors import StageError
from compress.training import loop
from compress.training.loop import Group, fit, linear
from students.lightcap.dropout import Dropout

QUIET = Progress(quiet=True)
CONFIG = Optimisation(learning_rate=0.01, warmup=0.2)


class Killed(Exception):
    pass


def save_each(monkeypatch) -> None:
    """State is saved after each step, however long that takes."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", float("inf"))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), Dropout(0.3),
                        nn.Linear(6 * 16, 5), nn.LayerNorm(5))
    return net.to(memory_format=torch.channels_last).train()


def trained(work: Path, steps: int = 12, kills: tuple[int, ...] = (), groups: int = 2) -> dict[str, torch.Tensor]:
    """The weights after `steps` steps; killed at the steps named in `kills`, each time beginning anew from the random network."""
    data = torch.randn(steps, 4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    for stop in (*kills, None):
        net = network()

        def loss_of(step: int) -> torch.Tensor:
            if step == stop:  # noqa: B023
                raise Killed
            x = data[step].contiguous(memory_format=torch.channels_last)
            return (net(x) - torch.arange(5.0)).square().mean()  # noqa: B023

        parts = [Group(list(net[:3].parameters()), 0.02), Group(list(net[3:].parameters()), 0.01)]
        parts = parts if groups == 2 else [Group(list(net.parameters()), 0.01)]
        try:
            fit(net, parts, steps, loss_of, CONFIG, 17, work, "part 1/2", QUIET)
        except Killed:
            continue
        return {name: tensor.clone() for name, tensor in net.state_dict().items()}
    raise AssertionError


@pytest.mark.parametrize("kills", [(0,), (1,), (5,), (11,), (3, 4, 9)])
@pytest.mark.parametrize("saved_each", [True, False])
def test_a_resumed_fit_is_the_undisturbed_one(tmp_path, monkeypatch, kills, saved_each):
    undisturbed = trained(tmp_path / "a")
    if saved_each:
        save_each(monkeypatch)
    resumed = trained(tmp_path / "b", kills=kills)
    assert undisturbed.keys() == resumed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, resumed[name]), name
    assert int(resumed["1.num_batches_tracked"]) == 12
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["part-1-of-2.safetensors", "precision"]


def test_a_resumed_fit_computes_nothing_twice(tmp_path, monkeypatch):
    save_each(monkeypatch)
    steps = []
    weight = nn.Parameter(torch.ones(3, 2))
    modules = nn.ParameterDict({"weight": weight})

    def loss_of(step: int) -> torch.Tensor:
        if step == 4 and len(steps) < 5:
            steps.append("killed")
            raise Killed
        steps.append(step)
        return weight.square().sum()

    with pytest.raises(Killed):
        fit(modules, [Group([weight], 0.1)], 6, loss_of, CONFIG, 1, tmp_path, "x", QUIET)
    for _ in range(2):  # the second finds it finished
        fit(modules, [Group([weight], 0.1)], 6, loss_of, CONFIG, 1, tmp_path, "x", QUIET)
    assert steps == [0, 1, 2, 3, "killed", 4, 5]


def test_all_of_a_state_goes_to_where_its_parameters_are(tmp_path):
    """A fused optimizer on a GPU wants its counts of steps there, too; the meta device stands for the GPU."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    loop.save_state(net, optimizer, tmp_path / "x.safetensors", 7)
    away = network().to("meta")
    optimizer = torch.optim.AdamW(away.parameters(), fused=False)
    with pytest.warns(UserWarning, match="copying from a non-meta parameter"):
        assert loop.load_state(away, optimizer, tmp_path / "x.safetensors") == 7
    assert {tensor.device.type for state in optimizer.state.values() for tensor in state.values()} == {"meta"}
    assert len(optimizer.state) == len(list(net.parameters()))


@pytest.mark.parametrize(("takes", "after"), [(4.0, [21, 155, 289]), (60.0, [21, 622, 1223])])
def test_a_state_that_is_slow_to_write_is_written_less_often(tmp_path, monkeypatch, takes, after):
    """By a clock of the test's own, on which a step takes a second: after SAVE_SECONDS, then after what writing takes over SAVE_SHARE, or
    after MOST_SECONDS."""
    clock, saves = [0.0], []

    def write(modules, optimizer, path, step):
        clock[0] += takes
        saves.append(step)

    def loss_of(step: int) -> torch.Tensor:
        clock[0] += 1.0
        return weight.square().sum()

    weight = nn.Parameter(torch.ones(2, 2))
    monkeypatch.setattr(loop, "save_state", write)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    fit(nn.ParameterDict({"w": weight}), [Group([weight], 0.1)], after[-1] + 11, loss_of, CONFIG, 1, tmp_path, "x", QUIET)
    assert saves == [*after, after[-1] + 11]


def test_randomness_is_of_seed_and_step(tmp_path):
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        weight = nn.Parameter(torch.ones(2, 2))
        numbers = drawn[name] = []

        def loss_of(step: int) -> torch.Tensor:
            numbers.append(float(torch.rand(())))  # noqa: B023
            return weight.sum()  # noqa: B023

        fit(nn.ParameterDict({"w": weight}), [Group([weight], 0.1)], 3, loss_of, CONFIG, seed, tmp_path / name, "x", QUIET)
    assert drawn["a"] == drawn["b"] != drawn["c"] and len(set(drawn["a"])) == 3


def test_a_loss_that_is_not_finite_ends_the_stage(tmp_path):
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(StageError, match="student: the loss is nan at step 3 of 5; lower learning_rate") as raised:
        fit(nn.ParameterDict({"w": weight}), [Group([weight], 0.1)], 5, lambda step: weight.sum() * (float("nan") if step == 2 else 1),
            CONFIG, 1, tmp_path, "student", QUIET)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("last", [4, 2])
def test_weights_that_a_gradient_lost_are_not_saved(tmp_path, monkeypatch, last):
    """After the last step no loss tells; before it, a save could come between."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "MOST_SECONDS", 0.0)
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(StageError, match=f"student: not all weights are finite after step {last + 1} of 5; lower learning_rate"):
        fit(nn.ParameterDict({"w": weight}), [Group([weight], 0.1)], 5,
            lambda step: weight.sum() + ((weight * 0).sum().sqrt() if step == last else 0), CONFIG, 1, tmp_path, "student", QUIET)
    with safe_open(str(tmp_path / "student.safetensors"), "pt") as file:
        assert file.metadata()["step"] == str(last) and file.get_tensor("model.w").isfinite().all()


def test_weights_that_the_last_step_loses_end_the_stage(tmp_path):
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(StageError, match="student: not all weights are finite after step 1 of 1; lower learning_rate"):
        fit(nn.ParameterDict({"w": weight}), [Group([weight], 1e39)], 1, lambda step: weight.sum(), CONFIG, 1, tmp_path, "student", QUIET)


@pytest.mark.parametrize(
    ("flags", "half", "chosen"), [(True, 0.4, "bf16"), (True, 0.95, "fp32"), (True, 2.0, "fp32"), (False, 0.4, "fp32")]
)
def test_auto_is_the_precision_that_this_processor_multiplies_faster_in(tmp_path, monkeypatch, flags, half, chosen):
    """The instruction alone does not tell: some processors that have it are slower for it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flags)
    monkeypatch.setattr(loop, "product_seconds", {torch.bfloat16: half, torch.float32: 1.0}.get)
    loop.multiplies_faster_in_bf16.cache_clear()
    try:
        with loop.autocast(loop.settled("auto", torch.device("cpu"), tmp_path), torch.device("cpu")):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)
    finally:
        loop.multiplies_faster_in_bf16.cache_clear()


def test_a_stage_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch):
    """Also on a processor, or in a moment, that `auto` would choose another for."""
    weight, seen, chosen = nn.Parameter(torch.ones(2, 2)), [], iter((True, False))
    save_each(monkeypatch)
    monkeypatch.setattr(loop, "multiplies_faster_in_bf16", lambda: next(chosen))

    def loss_of(step: int) -> torch.Tensor:
        if step == 2 and "killed" not in seen:
            seen.append("killed")
            raise Killed
        seen.append((weight @ weight).dtype)
        return weight.square().sum()

    with pytest.raises(Killed):
        fit(nn.ParameterDict({"w": weight}), [Group([weight], 0.1)], 4, loss_of, CONFIG, 1, tmp_path, "x", QUIET)
    fit(nn.ParameterDict({"w": weight}), [Group([weight], 0.1)], 4, loss_of, CONFIG, 1, tmp_path, "x", QUIET)
    assert seen == [*[torch.bfloat16] * 2, "killed", *[torch.bfloat16] * 2] and next(chosen) is False


def test_products_are_timed(monkeypatch):
    monkeypatch.setattr(loop, "PRODUCTS", 2)
    for dtype in (torch.float32, torch.bfloat16):
        began = time.perf_counter()
        assert 0 < loop.product_seconds(dtype) <= (time.perf_counter() - began) / 2  # the shorter of two


def test_the_schedule_goes_up_then_down():
    config = Optimisation(warmup=0.1, final_learning_rate=0.02)
    shares = [linear(step, 100, config) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert shares[10] == pytest.approx(1.0) and max(shares) <= 1.0
    falls = np.diff(shares[10:])
    assert falls == pytest.approx(np.full(89, falls[0])) and falls[0] == pytest.approx(-0.98 / 90)
    assert shares[-1] == pytest.approx(0.02, abs=0.02) and shares[-1] >= 0.02
    assert [linear(step, 1, config) for step in range(1)] == [1.0]
    assert all(0 < linear(step, steps, Optimisation(warmup=0.0)) <= 1 for steps in (1, 2, 7) for step in range(steps))


def test_learning_rates_and_decay_are_each_group_s(tmp_path):
    """With clipping out of reach Adam's first steps are of the size of the learning rate, and norms do not decay."""
    fast, slow, norm = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    config = Optimisation(warmup=0.0, weight_decay=0.5, clip_norm=1e9, final_learning_rate=1.0)
    fit(nn.ParameterDict({"a": fast, "b": slow, "c": norm}), [Group([fast, norm], 0.1), Group([slow], 0.01)], 1,
        lambda step: (fast.sum() + slow.sum() + norm.sum()), config, 1, tmp_path, "x", QUIET)
    assert float(fast.detach()[0, 0]) == pytest.approx(1 - 0.1 * 0.5 - 0.1, abs=1e-3)
    assert float(slow.detach()[0, 0]) == pytest.approx(1 - 0.01 * 0.5 - 0.01, abs=1e-3)
    assert float(norm.detach()[0]) == pytest.approx(1 - 0.1, abs=1e-3)
