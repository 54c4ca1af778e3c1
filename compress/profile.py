"""What a model costs, without data: a ledger row of an artifact, a run, or a preset, which is counted without weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress import foreign, foreign_row, models
from compress.artifact import Artifact
from compress.cache import finished
from compress.cost import TOKENS, costs, costs_of
from compress.errors import ModelError, UsageError
from compress.evaluate import settings_of
from compress.latency import TIMED_IMAGES, latency
from compress.ledger import row
from students.lightcap import PRESETS, preset
from students.lightcap.config import PREFIX_POSITION


def profile(model: str, tokens: int = TOKENS) -> dict:
    """Parameters, MACs, bytes and time of a caption of `tokens` word pieces, as a ledger row, and two sums of parts that papers name:
    `params_fusion` (embeddings and layers) and `params_without_alignment`; of a captioner that others made, without these sums. ModelError
    where `model` names nothing; UsageError for a longer caption than there are positions for."""
    _check(tokens, PREFIX_POSITION)
    if model in PRESETS and not Path(model).exists():
        return summed(row({"stage": "profile", "name": model} | costs_of(preset(model), tokens=tokens)))
    try:
        found = models.resolve(model)
    except ModelError as error:
        raise ModelError(f"{error.message}; presets: {', '.join(PRESETS)}") from None
    if found.foreign:
        captioner = foreign.read(found)
        counted = foreign_row.costs(captioner, tokens) | foreign_row.latency(captioner, pictures(captioner.image_size), tokens)
        return row(named_of(found) | {"bytes": found.bytes()} | counted)
    if found.config.get("mask_piece") is not None:
        _check(tokens, PREFIX_POSITION - 1)  # a [MASK] stands behind the last piece
    timed = latency(found, None, pictures(settings_of(found)["image_size"]), tokens)
    return summed(row(named_of(found) | costs(found, tokens) | timed))


def pictures(size: int) -> np.ndarray:
    """Noise, to be timed with."""
    return np.random.default_rng(0).integers(0, 256, (TIMED_IMAGES, size, size, 3), dtype=np.uint8)


def named_of(found: Artifact) -> dict:
    """An artifact of the cache is called by a hash there, and by its label in its row."""
    name = found.row().get("name") if finished(found.path) else None
    return {"stage": "profile", "name": name or found.path.name, "artifact": str(found.path)}


def _check(tokens: int, most: int) -> None:
    if tokens > most:
        raise UsageError(f"--tokens {tokens}: a caption has {most} positions; ask for no more")


def summed(counted: dict) -> dict:
    parts = counted["params_by_part"]
    fusion = parts["embeddings"] + parts["layers"]
    return counted | {"params_fusion": fusion, "params_without_alignment": counted["params"] - parts.get("alignment", 0)}
