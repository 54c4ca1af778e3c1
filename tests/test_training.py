"""The loop that resumes bit by bit, its batches, its stores and its targets."""

import dataclasses
import errno
import itertools
import os
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.config import Optimisation
from compress.context import Progress, Task
from compress.errors import StageError
from compress.training import features, loop
from compress.training.batches import IGNORED, Captions, order, pack
from compress.training.corpus import Corpus, disturbed
from compress.training.loop import Group, fit, linear
from compress.training.store import found, stored
from compress.training.targets import targets
from students.lightcap import LightCap, preset
from students.lightcap.dropout import Dropout

QUIET = Progress(quiet=True)
CONFIG = Optimisation(learning_rate=0.01, warmup=0.2)


# ---- fit


def test_what_was_done_before_a_kill_is_not_in_the_rate(monkeypatch):
    clock = iter([0.0, *[10.0] * 20])
    monkeypatch.setattr("compress.context.time.monotonic", lambda: next(clock))
    task = Task("teacher", 100, lambda task: None)
    task.resume(60)
    task.advance(20)
    assert task.line() == "teacher: 80/100, 2/s, 10 s left"
    clock = iter([0.0, *[100.0] * 20])
    large = Task("images", 2_265_740, lambda task: None)
    large.advance(226_574)
    assert large.line() == "images: 226574/2265740, 2266/s, 15 min 00 s left"


class Killed(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), Dropout(0.3),
                        nn.Linear(6 * 16, 5), nn.LayerNorm(5))  # fmt: skip
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
        monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    resumed = trained(tmp_path / "b", kills=kills)
    assert undisturbed.keys() == resumed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, resumed[name]), name
    assert int(resumed["1.num_batches_tracked"]) == 12
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["part-1-of-2.safetensors", "precision"]


def test_a_resumed_fit_computes_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
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
            CONFIG, 1, tmp_path, "student", QUIET)  # fmt: skip
    assert raised.value.exit_code == 1


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
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
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
        lambda step: (fast.sum() + slow.sum() + norm.sum()), config, 1, tmp_path, "x", QUIET)  # fmt: skip
    assert float(fast.detach()[0, 0]) == pytest.approx(1 - 0.1 * 0.5 - 0.1, abs=1e-3)
    assert float(slow.detach()[0, 0]) == pytest.approx(1 - 0.01 * 0.5 - 0.01, abs=1e-3)
    assert float(norm.detach()[0]) == pytest.approx(1 - 0.1, abs=1e-3)


# ---- batches

CAPTIONS = Captions.of([[[2, 7, 8, 3], [2, 9, 3]], [[2, 5, 6, 7, 8, 3]]])


def test_captions_are_counted():
    assert CAPTIONS.images == ((0, 1), (2,))
    assert CAPTIONS.offsets.tolist() == [0, 3, 5, 10] and CAPTIONS.predicted == 10
    assert (CAPTIONS.length(0), CAPTIONS.length(1)) == (5, 5)


def test_shares_are_of_what_images_say():
    captions = Captions.of([[[0, 2, 3, 1], [0, 2, 1]], [[0, 4, 1]]])  # [CLS] is never said
    assert captions.shares(6).tolist() == [0.0, 1.0, 0.5, 0.5, 0.5, 0.0]


def test_pack_by_hand():
    captions = Captions.of([[[2, 7, 8, 3], [2, 9, 3]], [[2, 5, 6, 3]]])
    batch = pack(captions, [1, 0])
    assert batch.images.tolist() == [1, 0]
    assert batch.tokens.tolist() == [[2, 5, 6, 0, 0], [2, 7, 8, 2, 9]]
    assert batch.targets.tolist() == [[5, 6, 3, IGNORED, IGNORED], [7, 8, 3, 9, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 0, 1]]
    assert batch.segments.tolist() == [[1, 1, 1, -1, -1], [1, 1, 1, 2, 2]]
    assert batch.rows.tolist() == [5, 6, 7, 0, 1, 2, 3, 4]
    mask = batch.mask(2)[:, 0].int().tolist()
    assert mask[1] == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    assert all(row[5:] == [0, 0] for row in mask[0][:5])  # nothing real sees padding


def test_rows_name_the_place_of_each_target():
    everything = np.concatenate([caption[1:] for caption in CAPTIONS.pieces])
    for images in ([0, 1], [1, 0], [1]):
        batch = pack(CAPTIONS, images)
        assert everything[batch.rows].tolist() == batch.targets[batch.targets != IGNORED].tolist()


def test_an_epoch_is_every_image_once():
    source = np.random.default_rng(0)
    captions = Captions.of([[list(range(source.integers(3, 30)))] for _ in range(203)])
    seen = {}
    for epoch, seed in itertools.product((0, 1), (3, 4)):
        batches = order(captions, 4, epoch, seed)
        assert sorted(np.concatenate(batches).tolist()) == list(range(203))
        assert sorted(map(len, batches)) == [3] + [4] * 50
        seen[epoch, seed] = [batch.tolist() for batch in batches]
        assert seen[epoch, seed] == [batch.tolist() for batch in order(captions, 4, epoch, seed)]
    assert len({str(value) for value in seen.values()}) == 4
    lengths = [[captions.length(i) for i in batch] for batch in order(captions, 4, 0, 3)]
    wasted = sum(max(row) * len(row) - sum(row) for row in lengths)
    shuffled = np.array([captions.length(i) for i in np.random.default_rng([3, 0]).permutation(203)[:200]]).reshape(-1, 4)
    assert wasted < 0.5 * (shuffled.max(1, keepdims=True) - shuffled).sum()  # sorted by length within a pool
    means = [np.mean(row) for row in lengths]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5  # but not from short to long


def test_steps_walk_through_epochs():
    data = Corpus(Captions.of([[[2, 5, 3]]] * 10), torch.arange(6), lambda model, images: None, "")
    assert [data.steps(epochs, 4) for epochs in (0.01, 1, 2, 2.5)] == [1, 3, 6, 8]
    batch_of = data.batches(4, seed=3)
    for epoch in range(2):
        images = np.concatenate([batch_of(3 * epoch + step).images for step in range(3)])
        assert sorted(images.tolist()) == list(range(10))
    assert batch_of(4).images.tolist() == data.batches(4, seed=3)(4).images.tolist()


# ---- stores and targets


def test_a_store_goes_on_after_a_kill(tmp_path):
    calls = []

    def fill(start: int, stop: int, kill: int | None = None) -> np.ndarray:
        if start == kill:
            raise Killed
        calls.append(start)
        return np.arange(start, stop, dtype=np.float32)[:, None] * np.ones(3, np.float32)

    with pytest.raises(Killed):
        stored(tmp_path, "k", (10, 3), "float32", 4, lambda a, b: fill(a, b, 8))
    assert found(tmp_path, "k") is None and calls == [0, 4]
    task = Task("k", 10, lambda task: None)
    array = stored(tmp_path, "k", (10, 3), "float32", 4, fill, task)
    assert calls == [0, 4, 8] and task.done == 10 and task.before == 8  # what was done before is no part of the rate
    assert array[:, 1].tolist() == list(range(10)) and array.shape == (10, 3)
    assert not array.flags.writeable
    again = stored(tmp_path, "k", (10, 3), "float32", 4, fill)
    assert calls == [0, 4, 8] and np.array_equal(again, array)
    assert np.array_equal(found(tmp_path, "k"), array)
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]


def test_a_store_has_its_room_before_it_is_filled(tmp_path, monkeypatch):
    def fill(start: int, stop: int) -> np.ndarray:
        assert (tmp_path / "k.partial").stat().st_blocks * 512 >= 1000 * 1000 * 4
        return np.zeros((stop - start, 1000), np.float32)

    assert stored(tmp_path, "k", (1000, 1000), "float32", 1000, fill).shape == (1000, 1000)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: 0.004 GB are needed: '.*/full.partial'"):
        stored(tmp_path, "full", (1000, 1000), "float32", 1000, fill)
    assert not (tmp_path / "full.partial").exists()

    def unable(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    assert stored(tmp_path, "other", (2, 2), "float32", 2, lambda start, stop: np.ones((2, 2), np.float32)).sum() == 4


def test_a_store_that_was_killed_before_its_first_block(tmp_path):
    with pytest.raises(Killed):
        stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: (_ for _ in ()).throw(Killed))
    array = stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: np.full((b - a, 2), a, np.float32))
    assert array.tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]]


def test_a_store_takes_no_count_of_one_that_is_gone(tmp_path):
    """Stopped between naming the array and removing its count; then the array is deleted, and a second attempt stopped at once."""
    (tmp_path / "k.json").write_text('{"rows": 4}')
    for _ in range(2):
        with pytest.raises(Killed):
            stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: (_ for _ in ()).throw(Killed))
    assert stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: np.ones((b - a, 2), np.float32)).sum() == 8


class Softmax:
    """A teacher whose logits are a linear function of image, piece and position."""

    vocabulary, hidden, layers, prefix, mask_piece = tuple("abcdefgh"), 8, 1, 4, None

    def __init__(self) -> None:
        self.table = 3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        self.calls = 0

    def to(self, where):
        return self

    def at(self, image: int, piece: int, position: int) -> torch.Tensor:
        return self.table[piece] * (1 + 0.1 * position) + 0.5 * self.table[:, piece] * image

    def logits(self, grid, tokens, positions, mask, real):
        self.calls += 1
        rows = [self.at(int(grid[b, 0, 0]), int(tokens[b, t]), int(positions[b, t])) for b, t in real.nonzero().tolist()]
        return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_are_the_teacher_s_softmax_at_each_place(tmp_path, temperature):
    source = np.random.default_rng(1)
    encoded = [[[2, *source.integers(4, 8, source.integers(1, 5)).tolist(), 3] for _ in range(1 + i % 3)] for i in range(70)]
    captions = Captions.of(encoded)
    data = Corpus(captions, torch.arange(8), lambda model, images: torch.tensor(np.asarray(images), dtype=torch.float32).view(-1, 1, 1), "")
    teacher = Softmax()
    ids, best = targets(teacher, "digest", data, "print", 3, temperature, "fp32", tmp_path, "teacher", QUIET)
    assert ids.shape == best.shape == (captions.predicted, 3) and teacher.calls == 2
    place = 0
    for image, group in enumerate(encoded):
        for caption in group:
            for position, piece in enumerate(caption[:-1]):
                wanted, order_ = (teacher.at(image, piece, position) / temperature).softmax(-1).topk(3)
                assert ids[place].tolist() == order_.tolist()
                np.testing.assert_allclose(best[place].astype(np.float32), wanted.numpy(), atol=1e-3)
                place += 1
    assert place == captions.predicted
    targets(teacher, "digest", data, "print", 3, temperature, "fp32", tmp_path, "teacher", QUIET)
    assert teacher.calls == 2  # read back
    targets(teacher, "another", data, "print", 3, temperature, "fp32", tmp_path, "teacher", QUIET)
    assert teacher.calls == 4


def test_other_questions_are_asked_anew(tmp_path):
    data = Corpus(Captions.of([[[2, 5, 3]]]), torch.arange(8), lambda model, images: torch.zeros(len(images), 1, 1), "a")
    given = {"teacher_digest": "d", "data": data, "fingerprint": "p", "top_k": 3, "temperature": 1.0, "precision": "fp32"}
    teacher, other = Softmax(), dataclasses.replace(data, features="b")
    for calls, more in enumerate([{}, {"temperature": 2.0}, {"precision": "bf16"}, {"fingerprint": "q"}, {"data": other}], 1):
        for _ in range(2):
            targets(teacher, **given | more, cache=tmp_path, label="teacher", progress=QUIET)
        assert teacher.calls == calls, more


def test_more_targets_than_pieces_are_all_of_them(tmp_path):
    data = Corpus(Captions.of([[[2, 5, 3]]]), torch.arange(8), lambda model, images: torch.zeros(len(images), 1, 1), "")
    ids, best = targets(Softmax(), "d", data, "p", 50, 1.0, "fp32", tmp_path, "teacher", QUIET)
    assert ids.shape == (2, 8) and best.astype(np.float32).sum(1) == pytest.approx([1, 1], abs=1e-2)


def test_a_real_teacher_s_targets_are_its_steps(tmp_path):
    """LightCap behind the teachers' interface, narrowed and packed, against its own cached decoding."""
    from teachers.lightcap import LightCapTeacher

    torch.manual_seed(0)
    model = LightCap(preset("tiny", vocabulary=30, dropout=0.0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
    keep = torch.tensor([2, 3, 5, 9, 11, 20])
    encoded = [[[0, 2, 3, 4, 1], [0, 5, 1]], [[0, 4, 1]]]  # places in `keep`
    grid = torch.randn(2, 25, 128)
    teacher = LightCapTeacher.__new__(LightCapTeacher)
    teacher.model, teacher.vocabulary, teacher.hidden, teacher.layers, teacher.prefix = model, (), 32, 2, model.config.prefix
    wanted = []
    with torch.no_grad():
        for image, group in enumerate(encoded):
            for caption in group:
                past = model.prefill(grid[image : image + 1])
                for position, piece in enumerate(caption[:-1]):
                    logits, past = model.step(keep[piece].view(1, 1), position, past)
                    wanted.append(logits[0, keep].softmax(-1))
    teacher.narrow(keep)
    data = Corpus(Captions.of(encoded), keep, lambda model, images: grid[np.asarray(images)], "")
    ids, best = targets(teacher, "d", data, "p", 6, 1.0, "fp32", tmp_path, "teacher", QUIET)
    for row, place in enumerate(wanted):
        found = np.zeros(6)
        found[ids[row]] = best[row]
        np.testing.assert_allclose(found, place.numpy(), atol=2e-3)


# ---- features


class Pictures:
    fingerprint = "f" * 64

    def __init__(self, count: int = 5, size: int = 80) -> None:
        self.examples = [types.SimpleNamespace(image_id=f"p{i}") for i in range(count)]
        self.size, self.read = size, []

    def __len__(self):
        return len(self.examples)

    def image(self, example):
        self.read.append(example.image_id)
        number = int(example.image_id[1:])
        return np.random.default_rng(number).integers(0, 256, (self.size, self.size + number, 3), dtype=np.uint8)


def test_features_are_the_encoder_s_and_computed_once(tmp_path, monkeypatch):
    from compress import runtime
    from students.lightcap.encoder import preprocessor

    torch.manual_seed(0)
    model, settings, data = LightCap(preset("tiny", vocabulary=9)).eval(), preprocessor("resnet-small", 80), Pictures()
    grids = features.grids(model, data, settings, tmp_path, QUIET)
    assert grids.shape == (5, 25, 128) and grids.dtype == np.float16 and sorted(data.read) == [f"p{i}" for i in range(5)]
    batch = np.stack([runtime.pixels(data.image(example), settings) for example in data.examples])
    with torch.no_grad():
        wanted = model.encode(torch.from_numpy(batch)).numpy()
    for picture in map(data.image, data.examples):  # the device's own preprocessing
        assert np.array_equal(features.squash(picture, settings), runtime.squash(picture, settings))
        seen = features.normalised(features.squash(picture, settings)[None], settings, torch.device("cpu"))[0]
        np.testing.assert_allclose(seen, runtime.pixels(picture, settings), atol=1e-5)
    np.testing.assert_allclose(grids, wanted, atol=1e-4, rtol=1e-3)  # half precision
    data.read.clear()
    assert np.array_equal(features.grids(model, data, settings, tmp_path, QUIET), grids) and data.read == []
    with torch.no_grad():
        model.encoder.blocks[0].bn1.running_mean += 0.5  # a buffer counts, too
    changed = features.grids(model, data, settings, tmp_path, QUIET)
    assert not np.array_equal(changed, grids)
    assert data.read == []  # the pictures were decoded already
    monkeypatch.setattr(features, "made_by", lambda module: "other code")
    assert np.array_equal(features.grids(model, data, settings, tmp_path, QUIET), changed) and len(data.read) == len(data.examples)
    other = Pictures()  # of the same names, as generated scenes of another seed are
    other.fingerprint = "e" * 64
    features.grids(model, other, settings, tmp_path, QUIET)
    assert len(other.read) == len(other.examples)


def test_pictures_are_disturbed_alike_in_every_precision():
    """In bf16 the places that a picture is read at would be off by up to half a pixel."""
    pictures, found = torch.rand(4, 3, 224, 224), []
    for chosen in ("fp32", "bf16"):
        torch.manual_seed(0)
        with loop.autocast(chosen, torch.device("cpu")):
            found.append(disturbed(pictures, True, 0.2))
    assert found[0].shape == pictures.shape and not torch.equal(found[0], pictures) and torch.equal(*found)
