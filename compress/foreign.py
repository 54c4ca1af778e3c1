"""Captioners that others made (`teachers.foreign`): what they say of photos, and how likely they find what people say."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor

from compress.artifact import Artifact
from compress.context import Progress
from compress.data import CaptionSet
from compress.decode import Special, beam_search
from compress.errors import ModelError
from compress.sources import made_by
from compress.training.corpus import Corpus
from compress.training.features import device, digest
from compress.training.loop import autocast
from compress.training.store import found, stored
from compress.training.targets import best_of
from students.lightcap.tokenizer import read_tokenizer
from teachers.foreign import Foreign, load
from teachers.layouts import WEIGHTS

TOKENS = 20  # word pieces of a caption at most, its end among them, as of lightcap's own
BEAM = 5  # for what students learn
BATCH = 8
WIDTH = 1024  # bytes of a caption at most


def read(artifact: Artifact) -> Foreign:
    """ModelError, in one line, where it is not whole."""
    try:
        return load(artifact.path, search)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from None


def search(model, grid: Tensor, start: int, end: int, beam: int, tokens: int) -> list[tuple[tuple[int, ...], float]]:
    return [(found.tokens, found.logprob) for found in beam_search(model, grid, Special(start, end, ()), beam, tokens)]


def captions(captioner: Foreign, data: CaptionSet, beam: int, advance: Callable = lambda n: None) -> list[tuple[str, float]]:
    """(caption, log-probability) of every example of `data`."""
    where, said = device(), []
    captioner.model.to(where)
    for start in range(0, len(data), BATCH):
        rows = range(start, min(start + BATCH, len(data)))
        said += captions_of(captioner, data, rows, beam, where)
        advance(len(rows))
    captioner.model.cpu()
    return said


def captions_of(captioner: Foreign, data: CaptionSet, rows: range, beam: int, where: torch.device) -> list[tuple[str, float]]:
    pictures = [Image.fromarray(data.image(data.examples[row])) for row in rows]
    return captioner.captions(captioner.pixels(pictures).to(where), beam, TOKENS)


def written(artifact: Artifact, data: CaptionSet, cache: Path, progress: Progress) -> list[str]:
    """The caption of each picture of `data` by beam search of BEAM, kept in `cache` as they come: large captioners take hours."""
    images = [example.image_id for example in data.examples]
    how = BEAM, TOKENS, made_by("teachers.foreign"), made_by("compress.decode"), inspect.getsource(captions_of)
    key = digest("written", artifact.digest(), *how, data.fingerprint, images)
    lines = found(cache / "written", key)
    if lines is None:
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


def places_of(artifact: Artifact, pieces: Sequence[str], label: str) -> list[int]:
    """The captioner's ids of a student's word `pieces`. ModelError where it does not have them all, and where it is lightcap's own, which
    reads grids of an encoder of its own."""
    if not artifact.foreign:
        raise ModelError(f"teacher '{label}' is lightcap's own and reads grids of its own encoder: match: captions learns what it wrote")
    if artifact.foreign == "coca":
        raise ModelError(f"teacher '{label}' is a coca, whose word pieces are not BERT's: match: captions learns what it wrote")
    try:
        theirs = read_tokenizer(artifact.path / "tokenizer.json").get_vocab()
    except ValueError as error:
        raise ModelError(str(error)) from None
    if lacking := next((piece for piece in pieces if piece not in theirs), None):
        raise ModelError(f"teacher '{label}' does not have the student's word pieces, such as '{lacking}': match: captions learns what it "
                         "wrote; to match tokens give the student the teacher's own (student.tokenizer)")
    return [theirs[piece] for piece in pieces]


def targets(
    artifact: Artifact, pieces: Sequence[str], train: CaptionSet, data: Corpus, precision: str, top_k: int, temperature: float, cache: Path,
    label: str, progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """As `compress.training.targets.targets`; `pieces` are the student's, by id. ModelError as `places_of`."""
    where = device()
    keep = torch.tensor(places_of(artifact, pieces, label))[data.keep]

    @functools.cache
    def captioner() -> Foreign:
        one = read(artifact)
        one.model.to(where)
        return one

    def logits_of(start: int, stop: int) -> Tensor:
        pictures = [Image.fromarray(train.image(example)) for example in train.examples[start:stop]]
        of_images = data.captions.images[start:stop]
        own = [[keep[list(data.captions.pieces[caption])].tolist() for caption in captions] for captions in of_images]
        with autocast(precision, where):
            return captioner().logits(captioner().pixels(pictures).to(where), own)[:, keep.to(where)]

    how = artifact.digest(), keep.tolist(), precision, made_by(__name__), train.fingerprint
    return best_of(logits_of, BATCH, how, data, top_k, temperature, cache, label, progress)


def rewrite(artifact: Artifact, folder: Path) -> None:
    """Its weights as safetensors, into `folder`."""
    save_model(read(artifact).model, str(folder / WEIGHTS[artifact.foreign][0]), metadata={"format": "pt"})


def caption_of_image(artifact: Artifact, beam: int) -> tuple[Callable[[Image.Image], tuple[str, float]], int]:
    """A function from a decoded image to (caption, log-probability), and the side in pixels of what is looked at."""
    captioner, where = read(artifact), device()
    captioner.model.to(where)

    def caption(image: Image.Image) -> tuple[str, float]:
        [said] = captioner.captions(captioner.pixels([image.convert("RGB")]).to(where), beam, TOKENS)
        return said

    return caption, captioner.image_size
