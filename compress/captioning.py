"""Captions of photos, one answer after the other: by ONNX Runtime without torch where the artifact is graphs, else by PyTorch."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from compress.artifact import Artifact
from compress.errors import ModelError, UsageError, beside, nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def photos(names: Sequence[str]) -> list[Path]:
    """The images that the arguments name, folders opened. A photo that is not there is an answer of its own."""
    photos = []
    for path in map(Path, names):
        if os.path.isdir(path):  # unlike Path's, false where its folder may not be read
            try:
                inside = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
            except OSError as error:
                raise UsageError(f"the folder {path} cannot be read ({error.strerror})") from None
            if not inside:
                raise UsageError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            photos.extend(inside)
        else:
            photos.append(path)
    return photos


def captions(chosen: Artifact, photos: Sequence[Path], beam: int) -> Iterator[dict]:
    return (without_torch if chosen.graphs else elsewhere if chosen.foreign else with_torch)(chosen, photos, beam)


def without_torch(chosen: Artifact, photos: Sequence[Path], beam: int) -> Iterator[dict]:
    from compress.process import thread_count
    from compress.runtime import Captioner

    captioner = Captioner(chosen.path, thread_count())
    yield from answers(photos, captioner.open, lambda image: captioner.caption(image, beam))


def with_torch(chosen: Artifact, photos: Sequence[Path], beam: int) -> Iterator[dict]:
    from compress import evaluate
    from compress.runtime import OVERSAMPLED, open_photo

    least = OVERSAMPLED * evaluate.settings_of(chosen)["image_size"]
    opened = functools.partial(open_photo, least=least)
    yield from answers(photos, opened, evaluate.caption_of_image(chosen, beam))


def elsewhere(chosen: Artifact, photos: Sequence[Path], beam: int) -> Iterator[dict]:
    from compress import foreign
    from compress.runtime import OVERSAMPLED, open_photo

    caption, side = foreign.caption_of_image(chosen, beam)
    yield from answers(photos, functools.partial(open_photo, least=OVERSAMPLED * side), caption)


def answers(photos: Sequence[Path], opened: Callable, caption_of: Callable) -> Iterator[dict]:
    """One answer per photo, in order: its caption with the milliseconds from decoded pixels to text, or why it cannot be read."""
    for photo in photos:
        try:
            image = opened(photo)
        except ValueError as error:
            hint = "" if os.path.exists(photo) else nearest(photo.name, beside(photo))
            yield {"image": str(photo), "error": f"{error}{hint}"}
            continue
        began = time.perf_counter()
        text, logprob = caption_of(image)
        milliseconds = (time.perf_counter() - began) * 1000
        if not math.isfinite(logprob):
            raise ModelError(f"what the model says of {photo} has the log-probability {logprob}: its weights are damaged; make it anew")
        yield {"image": str(photo), "caption": text, "logprob": float(logprob), "ms": round(milliseconds, 2)}
