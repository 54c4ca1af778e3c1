"""A teacher's token distributions over the training captions, computed once: the top k pieces of each place; the tail is what is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
    captions = data.captions
    where = device()
    how = teacher_digest, data.features, top_k, temperature, precision, made_by(__name__)
    key = digest("targets", *how, fingerprint, data.keep.tolist(), captions.pieces)
    count, width = len(captions.images), min(top_k, len(data.keep))
    longest = max(captions.length(i) for i in range(count))
    teacher.to(where)

    def fill(start: int, stop: int) -> np.ndarray:
        block = np.zeros((stop - start, longest, width, 2), np.float32)
        plain = pack(captions, range(start, stop)).to(where)
        batch = plain.probing(teacher.mask_piece)
        grid = data.grid_of(None, batch.images)
        with autocast(precision, where):
            logits = teacher.logits(grid, batch.tokens, batch.positions, batch.mask(teacher.prefix), batch.targets != IGNORED)
        best, ids = (logits.float() / temperature).softmax(-1).topk(width, dim=-1)
        real = plain.targets != IGNORED
        filled = block[:, : real.shape[1]]
        filled[real.cpu().numpy()] = np.stack([ids.cpu().numpy(), best.cpu().numpy()], -1)
        return block

    packed = found(cache / "targets", key)
    if packed is None:
        with progress.task(f"targets of {label}", count) as task:
            packed = stored(cache / "targets", key, (count, longest, width, 2), "float32", IMAGES, fill, task)
    ids = np.concatenate([packed[i, : captions.length(i), :, 0] for i in range(count)]).astype(np.int32)
    best = np.concatenate([packed[i, : captions.length(i), :, 1] for i in range(count)]).astype(np.float16)
    return ids, best
