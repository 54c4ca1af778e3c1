"""Batches of images, each with all its captions behind one shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
POOL = 16  # batches are cut from pools of this many, sorted by length, so that little padding is computed


@dataclass(frozen=True)
class Captions:
    """Every caption of a split as word pieces, [CLS] .. [SEP]; `images[i]` lists the captions of image i; `offsets[c]` counts the
    predicted pieces before caption c."""

    pieces: tuple[tuple[int, ...], ...]
    images: tuple[tuple[int, ...], ...]
    offsets: np.ndarray

    @staticmethod
    def of(encoded: Sequence[Sequence[Sequence[int]]]) -> Captions:
        """`encoded[i]` holds image i's captions."""
        pieces, images = [], []
        for captions in encoded:
            images.append(tuple(range(len(pieces), len(pieces) + len(captions))))
            pieces.extend(tuple(caption) for caption in captions)
        lengths = np.array([len(caption) - 1 for caption in pieces])
        return Captions(tuple(pieces), tuple(images), np.concatenate([[0], np.cumsum(lengths)]))

    @property
    def predicted(self) -> int:
        return int(self.offsets[-1])

    def length(self, image: int) -> int:
        return sum(len(self.pieces[c]) - 1 for c in self.images[image])

    def shares(self, vocabulary: int) -> np.ndarray:
        """(vocabulary,) float32: the share of images whose captions hold each piece."""
        counts = np.zeros(vocabulary, np.float32)
        for captions in self.images:
            counts[list({piece for c in captions for piece in self.pieces[c]})] += 1
        return counts / len(self.images)


@dataclass(frozen=True)
class Batch:
    """images (B,) rows of the features; tokens, positions, segments, targets (B, T): an image's captions one after the other, `segments`
    1.. for its captions and -1 for padding, `targets` the next piece or IGNORED; rows (n,) the place of each target among all
    of `Captions.predicted`, in the order of `targets[targets != IGNORED]`."""

    images: np.ndarray
    tokens: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    rows: np.ndarray

    def to(self, where: torch.device) -> Batch:
        if where.type == "cpu":
            return self
        moved = (x.to(where, non_blocking=True) for x in (self.tokens, self.positions, self.segments, self.targets))
        return Batch(self.images, *moved, self.rows)

    def mask(self, prefix: int) -> Tensor:
        """The sequence-to-sequence mask, (B, 1, prefix + T, prefix + T) bool: everything sees the prefix; a caption's piece sees its own
        caption up to itself."""
        b, t = self.segments.shape
        segments = torch.cat([self.segments.new_zeros(b, prefix), self.segments], 1)
        earlier = torch.ones(prefix + t, prefix + t, dtype=torch.bool, device=segments.device).tril()
        same = segments.unsqueeze(1) == segments.unsqueeze(2)
        return ((segments == 0).unsqueeze(1) | (same & earlier)).unsqueeze(1)


def pack(captions: Captions, images: Sequence[int]) -> Batch:
    width = max(captions.length(i) for i in images)
    shape = (len(images), width)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, targets = np.full(shape, -1, np.int64), np.full(shape, IGNORED, np.int64)
    rows = []
    for b, image in enumerate(images):
        place = 0
        for segment, c in enumerate(captions.images[image], 1):
            caption = captions.pieces[c]
            stop = place + len(caption) - 1
            tokens[b, place:stop], targets[b, place:stop] = caption[:-1], caption[1:]
            positions[b, place:stop], segments[b, place:stop] = np.arange(len(caption) - 1), segment
            rows.append(np.arange(captions.offsets[c], captions.offsets[c + 1]))
            place = stop
    return Batch(np.asarray(images), *map(torch.from_numpy, (tokens, positions, segments, targets)), np.concatenate(rows))


def order_images(count: int, epoch: int, seed: int) -> np.ndarray:
    """The images of one epoch in random order."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def order(captions: Captions, batch_images: int, epoch: int, seed: int) -> list[np.ndarray]:
    """The batches of one epoch as arrays of image numbers: a function of seed and epoch alone, so that a run resumes anywhere."""
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(captions.images))
    batches = []
    for start in range(0, len(shuffled), POOL * batch_images):
        pool = shuffled[start : start + POOL * batch_images]
        pool = pool[np.argsort([captions.length(i) for i in pool], kind="stable")]
        batches.extend(pool[first : first + batch_images] for first in range(0, len(pool), batch_images))
    return [batches[i] for i in random.permutation(len(batches))]
