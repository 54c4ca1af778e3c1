"""A teacher's token distributions over the training captions, computed once: the top k pieces of each place; the tail is what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from compress.context import Progress
from compress.sources import made_by
from compress.training.batches import IGNORED, pack
from compress.training.corpus import Corpus
from compress.training.features import device, digest
from compress.training.loop import autocast
from compress.training.store import found, stored
from teachers.teacher import Teacher

IMAGES = 64


def targets(
    teacher: Teacher, teacher_digest: str, data: Corpus, fingerprint: str, top_k: int, temperature: float, precision: str,
    cache: Path, label: str, progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n, k) into `data.keep` and probabilities (n, k) float16, for the n places that `data.captions` predict, best first.

    The teacher must have been narrowed to `data.keep`.
    """
    where = device()
    teacher.to(where)

    def logits_of(start: int, stop: int) -> Tensor:
        batch = pack(data.captions, range(start, stop)).to(where).probing(teacher.mask_piece)
        grid = data.grid_of(None, batch.images)
        with autocast(precision, where):
            return teacher.logits(grid, batch.tokens, batch.positions, batch.mask(teacher.prefix), batch.targets != IGNORED)

    how = teacher_digest, data.features, precision, made_by(__name__), fingerprint
    return best_of(logits_of, IMAGES, how, data, top_k, temperature, cache, label, progress)


def best_of(
    logits_of: Callable[[int, int], Tensor], images: int, how: Sequence[str], data: Corpus, top_k: int, temperature: float, cache: Path,
    label: str, progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """`targets` of whatever gives `logits_of(start, stop)`, over `data.keep` at the places that the captions of so many images predict;
    asked for blocks of `images`. `how` names what the logits depend on beside the captions."""
    captions = data.captions
    key = digest("targets", *how, top_k, temperature, data.keep.tolist(), captions.pieces)
    count, width = len(captions.images), min(top_k, len(data.keep))
    longest = max(captions.length(i) for i in range(count))

    def fill(start: int, stop: int) -> np.ndarray:
        block = np.zeros((stop - start, longest, width, 2), np.float32)
        best, ids = (logits_of(start, stop).float() / temperature).softmax(-1).topk(width, dim=-1)
        real = pack(captions, range(start, stop)).targets != IGNORED
        filled = block[:, : real.shape[1]]
        filled[real.numpy()] = np.stack([ids.cpu().numpy(), best.cpu().numpy()], -1)
        return block

    packed = found(cache / "targets", key)
    if packed is None:
        with progress.task(f"targets of {label}", count) as task:
            packed = stored(cache / "targets", key, (count, longest, width, 2), "float32", images, fill, task)
    ids = np.concatenate([packed[i, : captions.length(i), :, 0] for i in range(count)]).astype(np.int32)
    best = np.concatenate([packed[i, : captions.length(i), :, 1] for i in range(count)]).astype(np.float16)
    return ids, best
