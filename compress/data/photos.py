"""Photos on disk: found, hashed, and all decoded once, so that a broken file is named before training starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from compress.data.captions import CaptionSet, Example, UnreadableImage, fingerprint
from compress.errors import DataError
from compress.process import cores
from compress.sources import made_by

WHOLE = 2 << 30  # bytes: a data set up to this size is hashed in full
ENDS = 64 << 10  # bytes hashed at either end of each image of a larger one
SHOWN = 5
Content = Path | Callable[[], bytes]  # an image's file, or what gives its bytes


def decode(content: Content, name: str) -> np.ndarray:
    """An image's pixels, (height, width, 3) uint8 RGB as a device sees them: upright by the EXIF tag, what is transparent on white, 16-bit
    grey scaled to 8. Raises UnreadableImage."""
    try:
        with Image.open(content if isinstance(content, Path) else BytesIO(content())) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UnreadableImage(f"image {name} is missing") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"image {name} is no image file that Pillow reads") from None
    except Exception as error:  # of a broken file Pillow's readers raise anything, from OSError to struct.error
        raise UnreadableImage(f"image {name} cannot be decoded: {error}") from None


def _rgb(image: Image.Image) -> np.ndarray:
    """As `compress.runtime.flat`, which stands alone on the device, and whose changes shall train nothing anew."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide >> 8 if wide.max(initial=0) > 255 else wide).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def readable(
    source: str,
    name: str,
    examples: Sequence[Example],
    contents: dict[str, Content],
    allowed: float,
    cache: Path | None = None,
    progress=None,
) -> CaptionSet:
    """The caption set of those examples whose image decodes; `contents` holds the file of each image name.

    What does not decode is listed in `unreadable`; a share above `allowed` raises DataError with the first names. With
    a `cache` folder the outcome is kept as JSON under a fingerprint, which is over file contents, and under the code that decodes:
    another Pillow may read what this one cannot. What could not be read is tried again each time. `progress`
    (`compress.context.Progress`) is told how far it is.
    """
    digests = _digests(examples, contents, progress)
    mark = fingerprint(source, examples, digests)
    record = cache / f"images-{mark}-{made_by(__name__)[:16]}.json" if cache else None
    known = _recorded(record)
    asked = examples if known is None else [example for example in examples if example.image_id in known]  # they may be back
    problems = _problems(asked, contents, progress) if asked else {}
    share = len(problems) / len(examples)
    if share > allowed:
        first = "; ".join(list(problems.values())[:SHOWN]) + ("; ..." if len(problems) > SHOWN else "")
        raise DataError(
            f"{name}: {len(problems)} of {len(examples)} images ({share:.1%}) cannot be read, and {allowed:.1%} are "
            f"allowed: {first}. Mend them, choose their folder with --set data.images=PATH, or leave them out with "
            f"--set data.max_unreadable={min(1.0, share + 0.001):.3f}"
        )
    if record and problems != known:
        _record(record, problems)
    kept = tuple(example for example in examples if example.image_id not in problems)
    if not kept:
        raise DataError(
            f"{name}: not one of {len(examples)} images can be read: choose their folder with --set data.images=PATH"
        )
    if problems:  # other images may be readable the next time
        mark = hashlib.sha256(json.dumps([mark, sorted(problems)]).encode()).hexdigest()
    splits = {example.split for example in kept}
    marks = {split: fingerprint(source, [example for example in kept if example.split == split], digests) for split in splits}
    return CaptionSet(
        kept, mark, name, tuple(problems), lambda example: decode(contents[example.image_id], example.image_id), marks
    )


def _digests(examples: Sequence[Example], contents: dict[str, Content], progress) -> dict[str, str]:
    """Size and SHA-256 of each image that is there; of files above WHOLE bytes altogether, of the two ends of each."""
    sizes = {}
    for example in examples:
        content = contents[example.image_id]
        try:
            sizes[example.image_id] = content.stat().st_size if isinstance(content, Path) else None
        except (OSError, ValueError):
            continue
    whole = sum(size or 0 for size in sizes.values()) <= WHOLE

    def digest(name: str) -> str:
        content, size = contents[name], sizes[name]
        try:
            if not isinstance(content, Path):
                found = content()
                size = len(found)
            else:
                with content.open("rb") as file:
                    if whole or size <= 2 * ENDS:
                        found = file.read()
                    else:
                        found = file.read(ENDS)
                        file.seek(-ENDS, os.SEEK_END)
                        found += file.read(ENDS)
        except OSError:
            return f"{size} unreadable"
        return f"{size} {hashlib.sha256(found).hexdigest()}"

    return dict(zip(sizes, _each(digest, list(sizes), "photos compared", progress), strict=True))


def _problems(examples: Sequence[Example], contents: dict[str, Content], progress) -> dict[str, str]:
    """What is wrong, by image name, with each image that does not decode."""

    def problem(example: Example) -> str | None:
        try:
            decode(contents[example.image_id], example.image_id)
        except UnreadableImage as error:
            return error.message
        return None

    Image.init()  # before the threads, which would race to load Pillow's formats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large or oddly tagged pictures that it reads all the same
        found = zip(examples, _each(problem, examples, "photos decoded", progress), strict=True)
        return {example.image_id: message for example, message in found if message}


def _each(of: Callable, items: Sequence, label: str, progress) -> list:
    """`of` each of `items`, on every core: reading and decoding let other threads run."""
    with ThreadPoolExecutor(cores()) as pool, contextlib.ExitStack() as shown:
        task = shown.enter_context(progress.task(label, len(items))) if progress else None
        results = []
        for result in pool.map(of, items):
            results.append(result)
            if task:
                task.advance()
        return results


def _recorded(record: Path | None) -> dict[str, str] | None:
    try:
        return json.loads(record.read_text())["unreadable"] if record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or half-written: decode again


def _record(record: Path, problems: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # without it the images are decoded again; what cannot be written is said where it has to be
        record.parent.mkdir(parents=True, exist_ok=True)
        part = record.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"unreadable": problems}))
        part.replace(record)


def find(folder: Path, names: Sequence[str], places: Sequence[str] = ()) -> dict[str, Path]:
    """The file of each image name, in `folder` or the first of its sub-folders `places` that has it, if any."""
    there = [place for place in places if os.path.isdir(folder / place)]  # unlike Path's, false where nothing may be read
    files = {}
    for name in names:
        spots = [folder / name, *(folder / place / name for place in there)]
        files[name] = next((spot for spot in spots if os.path.exists(spot)), spots[0]) if there else spots[0]
    return files
