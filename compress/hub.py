"""Captioners that others made (`teachers.hub`): what they say of photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.artifact import Artifact
from compress.context import Progress
from compress.data import CaptionSet
from compress.decode import Special, beam_search
from compress.errors import ModelError
from compress.sources import made_by
from compress.training.features import device, digest
from compress.training.store import stored
from teachers.hub import Finished, load

TOKENS = 20  # word pieces of a caption at most, its end among them, as of lightcap's own
BEAM = 5  # for what students learn
BATCH = 8
WIDTH = 1024  # bytes of a caption at most


def read(artifact: Artifact) -> Finished:
    """ModelError, in one line, where it is not whole."""
    try:
        return load(artifact.path, search)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from None


def search(model, grid: Tensor, start: int, end: int, beam: int, tokens: int) -> list[tuple[tuple[int, ...], float]]:
    return [(found.tokens, found.logprob) for found in beam_search(model, grid, Special(start, end, ()), beam, tokens)]


def captions(
    artifact: Artifact, data: CaptionSet, beam: int, cache: Path, progress: Progress, advance: Callable = lambda n: None
) -> list[tuple[str, float]]:
    """(caption, log-probability) of every example of `data`, as `compress.evaluate.captions` gives them."""
    captioner, where, said = read(artifact), device(), []
    captioner.model.to(where)
    for start in range(0, len(data), BATCH):
        rows = range(start, min(start + BATCH, len(data)))
        said += captions_of(captioner, data, rows, beam, where)
        advance(len(rows))
    return said


def captions_of(captioner: Finished, data: CaptionSet, rows: range, beam: int, where: torch.device) -> list[tuple[str, float]]:
    pictures = [Image.fromarray(data.image(data.examples[row])) for row in rows]
    return captioner.captions(captioner.pixels(pictures).to(where), beam, TOKENS)


def written(artifact: Artifact, data: CaptionSet, cache: Path, progress: Progress) -> list[str]:
    """The caption of each picture of `data` by beam search of BEAM, kept in `cache` as they come: large captioners take hours."""
    images = [example.image_id for example in data.examples]
    key = digest("written", artifact.digest(), BEAM, TOKENS, made_by("teachers.hub"), data.fingerprint, images)
    captioner, where = read(artifact), device()
    captioner.model.to(where)

    def fill(start: int, stop: int) -> np.ndarray:
        said = captions_of(captioner, data, range(start, stop), BEAM, where)
        block = np.zeros((stop - start, WIDTH), np.uint8)
        for line, (text, _) in zip(block, said, strict=True):
            letters = text.encode()[:WIDTH]
            line[: len(letters)] = np.frombuffer(letters, np.uint8)
        return block

    with progress.task("captions of train", len(data)) as task:
        lines = stored(cache / "written", key, (len(data), WIDTH), "uint8", BATCH, fill, task)
    return [bytes(line).rstrip(b"\0").decode(errors="ignore") for line in lines]


def caption_of_image(artifact: Artifact, beam: int) -> tuple[Callable[[Image.Image], tuple[str, float]], int]:
    """A function from a decoded image to (caption, log-probability), and the side in pixels of what is looked at."""
    captioner = read(artifact)

    def caption(image: Image.Image) -> tuple[str, float]:
        [said] = captioner.captions(captioner.pixels([image.convert("RGB")]), beam, TOKENS)
        return said

    return caption, captioner.image_size
