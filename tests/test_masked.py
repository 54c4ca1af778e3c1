"""Models that predict masked pieces: what is masked in training, and that [MASK] appended in decoding is the same question everywhere."""

import dataclasses

import numpy as np
import pytest
import torch
from stage_context import context

from compress import data, profile
from compress.artifact import Artifact
from compress.config import Data, Distill, Student, Train
from compress.decode import Special, beam_search
from compress.errors import UsageError
from compress.stages import distill, train
from compress.stages.quantize.decoder import teacher_forced
from compress.stages.quantize.observe import TeacherForced
from compress.training.batches import IGNORED, Captions, Masking, pack, pack_masked
from compress.training.start import read_captioner
from students.lightcap import LightCap, preset

MASK = 4
CAPTIONS = [[[2, 7, 9, 11, 3], [2, 30, 3], [2, 5, 5, 6, 8, 21, 3]], [[2, 17, 18, 3]], [[2, 39, 12, 3], [2, 6, 3]]]


@pytest.fixture(scope="module")
def model() -> LightCap:
    torch.manual_seed(1)
    model = LightCap(dataclasses.replace(preset("tiny", vocabulary=40, heads=2), mask_piece=MASK)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and not name.startswith("encoder."):
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def grid() -> torch.Tensor:
    return torch.randn(3, 25, 128, generator=torch.Generator().manual_seed(2))


def stepwise(model: LightCap, grid: torch.Tensor, caption: list[int]) -> torch.Tensor:
    """Logits (length, V) by whole passes over [prefix | caption so far, MASK], without any cache."""
    rows = []
    with torch.no_grad():
        for count in range(1, len(caption)):
            tokens = torch.tensor([[*caption[:count], MASK]])
            places = torch.arange(count + 1)[None]
            first, total = grid.shape[1], grid.shape[1] + count + 1
            mask = torch.ones(total, total, dtype=torch.bool).tril()
            mask[:, :first] = True
            rows.append(model.heads(model.states(grid, tokens, places, mask[None, None])[0, -1], model.word))
    return torch.stack(rows)


def test_cached_steps_are_whole_passes(model, grid):
    caption = CAPTIONS[0][2]
    with torch.no_grad():
        past, found = model.prefill(grid[:1]), []
        for position, token in enumerate(caption[:-1]):
            logits, past = model.step(torch.tensor([[token]]), position, past)
            found.append(logits[0])
    torch.testing.assert_close(torch.stack(found), stepwise(model, grid[:1], caption), atol=1e-4, rtol=1e-4)
    assert past[0].own_length == len(caption) - 1  # no [MASK] is kept


def test_probing_asks_all_places_at_once(model, grid):
    """One packed pass gives what decoding would, for every piece of every caption, in the order of `rows`."""
    captions = Captions.of(CAPTIONS)
    plain = pack(captions, range(3))
    batch = plain.probing(MASK)
    with torch.no_grad():
        states = model.states(grid, batch.tokens, batch.positions, batch.mask(25))
        found = model.heads(states[batch.targets != IGNORED], model.word)
    wanted = torch.cat([stepwise(model, grid[i : i + 1], caption) for i, image in enumerate(CAPTIONS) for caption in image])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.targets[batch.targets != IGNORED], plain.targets[plain.targets != IGNORED])
    assert np.array_equal(batch.rows, np.arange(captions.predicted)) and plain.probing(None) is plain


def test_calibration_asks_all_places_as_steps_do(model, grid):
    """Observers see a [MASK] behind every piece, with what stands before it, not one behind the last alone."""
    inputs = teacher_forced(model, grid[:1], CAPTIONS[0])
    with torch.no_grad():
        found = TeacherForced(model)(*inputs)[0][inputs[1][0] == MASK]
    expected = torch.cat([stepwise(model, grid[:1], caption) for caption in CAPTIONS[0]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_masked():
    captions = Captions.of([[list(range(100, 113))] * 5] * 40)
    masking = Masking(MASK, vocabulary=1000)
    batch = pack_masked(captions, range(40), masking, np.random.default_rng(3))
    chosen = batch.targets != IGNORED
    assert int(chosen.sum()) == 40 * 5 * 2  # 15 % of 12 pieces
    assert (batch.positions[chosen] > 0).all() and not chosen[batch.positions == 0].any()  # never [CLS]
    assert torch.equal(batch.targets[chosen], 100 + batch.positions[chosen])
    assert (batch.tokens[~chosen & (batch.segments > 0)] == 100 + batch.positions[~chosen & (batch.segments > 0)]).all()
    masked, same = (batch.tokens[chosen] == MASK).float().mean(), (batch.tokens[chosen] == batch.targets[chosen]).float().mean()
    assert abs(float(masked) - 0.8) < 0.07 and abs(float(same) - 0.1) < 0.05
    assert len(set(batch.positions[chosen].tolist())) == 12  # each place, [SEP]'s too
    lengths = captions.offsets[:-1].repeat(2)
    assert np.array_equal(batch.rows, lengths + batch.positions[chosen].numpy() - 1)
    assert (batch.said() == torch.where((batch.segments > 0) & (batch.positions > 0), 100 + batch.positions, IGNORED)).all()
    plain = pack(captions, range(40))
    assert torch.equal(plain.said(), plain.targets)
    again = pack_masked(captions, range(40), masking, np.random.default_rng(3))
    assert torch.equal(again.tokens, batch.tokens)
    short = pack_masked(Captions.of([[[2, 3]], [[2, *range(5, 60), 3]]]), range(2), masking, np.random.default_rng(0))
    assert (short.targets != IGNORED).sum(1).tolist() == [1, 3]  # at least one, at most three


def test_a_masked_piece_sees_what_is_before_it(model, grid):
    """A later piece changes nothing at an earlier place, another caption changes nothing at all."""
    batch = pack_masked(Captions.of(CAPTIONS), range(3), Masking(MASK, 40), np.random.default_rng(1))
    changed = dataclasses.replace(batch, tokens=batch.tokens.clone())
    last = int((batch.segments[0] == 3).nonzero()[-2])
    changed.tokens[0, last] = 33
    with torch.no_grad():
        before, after = (model.states(grid, b.tokens, b.positions, b.mask(25)) for b in (batch, changed))
    moved = (before[0] - after[0]).abs().amax(-1) > 1e-6
    assert moved[last:][batch.segments[0][last:] > 0].all() and not moved[:last].any()


def test_the_exported_captioner_is_the_model(model, tmp_path):
    from compress import runtime
    from compress.stages.export import export
    from compress.training.start import write_captioner
    from students.lightcap.encoder import preprocessor
    from students.lightcap.tokenizer import SPECIAL, word_pieces

    (tmp_path / "float").mkdir()
    write_captioner(tmp_path / "float", model, word_pieces([*SPECIAL, *(f"w{i}" for i in range(5, 40))]), preprocessor("resnet-small", 80))
    export(Artifact(tmp_path / "float"), tmp_path / "out")
    captioner = runtime.Captioner(tmp_path / "out", threads=1)
    pixels = torch.randn(3, 3, 80, 80, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        grid = model.encode(pixels)
        found = [item.tokens for item in beam_search(model, grid, Special(2, 3, (0, 1, 4)), 3, 8)]
    said = captioner.search(captioner.encode(pixels.numpy()), 3, 8)
    assert [tuple(ids) for ids, _ in said] == found and len(set(found[0])) > 1
    with pytest.raises(UsageError, match="--tokens 64: a caption has 63 positions"):
        profile.profile(str(tmp_path / "out"), 64)  # the last one is that of the [MASK] behind the last piece
    assert profile.profile(str(tmp_path / "out"), 63)["latency_ms"]["p50"] > 0


def test_train_and_distill(tmp_path):
    """A masked teacher learns to caption, and its student is of the same kind."""
    scenes = data.load(Data(train_images=24, val_images=4))
    made = {}

    def run(name, stage_run, kind, config, parent=None):
        student, cache = Student(preset="tiny", heads=2), tmp_path / "cache"
        here = context(tmp_path / name, scenes, kind, config, student, name, cache=cache, artifacts=made)
        stage_run(parent, config, here)
        made[name] = Artifact(here.output)

    run("teacher", train.run, "train", Train(preset="tiny", objective="masked", epochs=60, batch_images=8, learning_rate=4e-3, dropout=0.0))
    config = Distill(teachers=("teacher",), match=("tokens",), epochs=2, batch_images=8)
    run("student", distill.run, "distill", config)
    teacher, tokenizer, _ = read_captioner(made["teacher"].path)
    student = read_captioner(made["student"].path)[0]
    assert teacher.config.mask_piece == student.config.mask_piece == tokenizer.token_to_id("[MASK]")
    grid = torch.zeros(1, 25, 128)
    said = beam_search(teacher, grid, Special.of(tokenizer), 3)[0]
    words = tokenizer.decode(list(said.tokens)).split()
    assert {"a", "the"} & set(words) and len(words) > 3
    run("causal", train.run, "train", Train(preset="tiny", epochs=1, batch_images=8))
    run("taught", distill.run, "distill", config, made["causal"])  # a masked teacher is asked in its own way
    assert read_captioner(made["taught"].path)[0].config.mask_piece is None
