"""A teacher's targets are its softmax at each place, asked for once."""

import dataclasses

import numpy as np
import pytest
import torch

from compress.context import Progress
from compress.training.batches import Captions
from compress.training.corpus import Corpus
from compress.training.targets import targets
from students.lightcap import LightCap, preset

QUIET = Progress(quiet=True)


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
