"""Batches of images, each with all its captions behind one shared prefix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
        """(vocabulary,) float32: the share of images whose captions say each piece ([CLS] is never said)."""
        counts = np.zeros(vocabulary, np.float32)
        for captions in self.images:
            counts[list({piece for c in captions for piece in self.pieces[c][1:]})] += 1
        return counts / len(self.images)


@dataclass(frozen=True)
class Batch:
    """images (B,) rows of the features; tokens, positions, segments, targets (B, T): an image's captions one after the other, `segments`
    1.. for its captions and -1 for padding, `targets` the piece to predict there or IGNORED; rows (n,) the place of each target among all
    of `Captions.predicted`, in the order of `targets[targets != IGNORED]`. probes: the first column of [MASK]s that were appended to ask
    for pieces, which nothing but themselves sees; T where there are none."""

    images: np.ndarray
    tokens: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    rows: np.ndarray
    probes: int

    def to(self, where: torch.device) -> Batch:
        if where.type == "cpu":
            return self
        moved = (x.to(where, non_blocking=True) for x in (self.tokens, self.positions, self.segments, self.targets))
        return Batch(self.images, *moved, self.rows, self.probes)

    def mask(self, prefix: int) -> Tensor:
        """The sequence-to-sequence mask, (B, 1, prefix + T, prefix + T) bool: everything sees the prefix; a caption's piece sees its own
        caption up to itself."""
        b, t = self.segments.shape
        zeros = self.segments.new_zeros(b, prefix)
        segments, places = torch.cat([zeros, self.segments], 1), torch.cat([zeros, self.positions], 1)
        column = torch.arange(prefix + t, device=segments.device)
        earlier = (places.unsqueeze(1) < places.unsqueeze(2)) & (column < prefix + self.probes) | (column == column.unsqueeze(1))
        same = segments.unsqueeze(1) == segments.unsqueeze(2)
        return ((segments == 0).unsqueeze(1) | (same & earlier)).unsqueeze(1)

    def said(self) -> Tensor:
        """(B, T) every piece of the captions but [CLS], masked ones too, or IGNORED."""
        seen = torch.where((self.segments > 0) & (self.positions > 0), self.tokens, IGNORED)
        return torch.where(self.targets == IGNORED, seen, self.targets)

    def probing(self, mask_piece: int | None) -> Batch:
        """The same predictions from a model of masked pieces, as it decodes: for each target a [MASK] at its place, which sees the caption
        before it. For a model of the next piece (None) the batch is as it was."""
        if mask_piece is None:
            return self
        masks = torch.full_like(self.tokens, mask_piece)
        segments = torch.cat([self.segments, torch.where(self.targets == IGNORED, -1, self.segments)], 1)
        targets = torch.cat([torch.full_like(self.targets, IGNORED), self.targets], 1)
        tokens, positions = torch.cat([self.tokens, masks], 1), torch.cat([self.positions, self.positions + 1], 1)
        return Batch(self.images, tokens, positions, segments, targets, self.rows, self.tokens.shape[1])


def pack(captions: Captions, images: Sequence[int]) -> Batch:
    """Every piece after the first is predicted, from those before it."""
    width = max(captions.length(i) for i in images)
    tokens, positions, segments, targets = (np.full((len(images), width), value) for value in (0, 0, -1, IGNORED))
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
    return Batch(np.asarray(images), *map(torch.from_numpy, (tokens, positions, segments, targets)), np.concatenate(rows), width)


@dataclass(frozen=True)
class Masking:
    """Masked pieces as Oscar and VinVL train them: `share` of a caption's pieces, at least one and at most `most`, of which 80 % become
    [MASK], 10 % another piece, and 10 % stay; [SEP] is one of them, so that the end is learned."""

    mask_piece: int
    vocabulary: int
    share: float = 0.15
    most: int = 3


def pack_masked(captions: Captions, images: Sequence[int], masking: Masking, random: np.random.Generator) -> Batch:
    """The pieces that `masking` chooses are predicted where they stand; a piece sees what is before it, masks and all."""
    width = max(captions.length(i) + len(captions.images[i]) for i in images)
    tokens, positions, segments, targets = (np.full((len(images), width), value) for value in (0, 0, -1, IGNORED))
    rows = []
    for b, image in enumerate(images):
        place = 0
        for segment, c in enumerate(captions.images[image], 1):
            caption = np.array(captions.pieces[c])
            stop = place + len(caption)
            count = min(masking.most, max(1, round(masking.share * (len(caption) - 1))), len(caption) - 1)
            chosen = np.sort(random.permutation(len(caption) - 1)[:count]) + 1
            targets[b, place + chosen] = caption[chosen]
            fate = random.random(count)
            caption[chosen[fate < 0.8]] = masking.mask_piece
            other = chosen[fate >= 0.9]
            caption[other] = random.integers(masking.vocabulary, size=len(other))
            tokens[b, place:stop], positions[b, place:stop], segments[b, place:stop] = caption, np.arange(len(caption)), segment
            rows.append(captions.offsets[c] + chosen - 1)
            place = stop
    return Batch(np.asarray(images), *map(torch.from_numpy, (tokens, positions, segments, targets)), np.concatenate(rows), width)


def steps_of(count: int, epochs: float, batch_images: int) -> int:
    """Batches in `epochs` of `count` images, at least one."""
    return max(1, round(epochs * -(-count // batch_images)))


def image_batches(count: int, batch_images: int, seed: int) -> Callable[[int], np.ndarray]:
    """Step number -> the images of its batch, ascending; each epoch has all `count` of them in an order of its own, from the seed."""
    per_epoch = -(-count // batch_images)

    @functools.lru_cache(maxsize=1)
    def shuffled(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    def images(step: int) -> np.ndarray:
        epoch, within = divmod(step, per_epoch)
        return np.sort(shuffled(epoch)[within * batch_images :][:batch_images])

    return images


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
