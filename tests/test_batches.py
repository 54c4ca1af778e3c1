"""Captions packed into batches, and the order that they come in."""

import itertools

import numpy as np
import torch

from compress.training.batches import IGNORED, Captions, order, pack
from compress.training.corpus import Corpus

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
