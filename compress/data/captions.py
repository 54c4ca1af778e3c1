"""Caption sets: images by name, their split, and what people wrote about each."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from compress.errors import DataError, nearest

SPLITS = {"validation": "val", "valid": "val", "dev": "val", "restval": "train", "training": "train", "testing": "test"}  # other names


class UnreadableImage(DataError):
    """An image that is missing or cannot be decoded; the message names it."""


@dataclass(frozen=True)
class Example:
    """One image: its file name (or "scene-000123"), its split, and its captions as written."""

    image_id: str
    split: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionSet:
    """Images with captions. `fingerprint` (SHA-256, hex) stands for names, splits, captions and image contents, `marks` for those of each
    split alone: what is trained depends on no other images than its own.

    `unreadable` names the images that were left out since they are missing or cannot be decoded.
    """

    examples: tuple[Example, ...]
    fingerprint: str
    name: str
    unreadable: tuple[str, ...] = ()
    reader: Callable[[Example], np.ndarray] | None = field(default=None, repr=False, compare=False)
    marks: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def left_out(self) -> str | None:
        """A line that names some of `unreadable`, if there are any."""
        if not self.unreadable:
            return None
        some = ", ".join(self.unreadable[:5]) + (", ..." if len(self.unreadable) > 5 else "")
        return f"{len(self.unreadable)} images are missing or unreadable and left out: {some}"

    def splits(self) -> dict[str, int]:
        """Images per split, in order of appearance."""
        return dict(Counter(example.split for example in self.examples))

    def split(self, name: str) -> CaptionSet:
        """The examples of one split, with a fingerprint of their own. Raises DataError naming the splits there are."""
        chosen = tuple(example for example in self.examples if example.split == name)
        if not chosen:
            there = ", ".join(f"{split} ({count})" for split, count in self.splits().items())
            raise DataError(
                f"{self.name}: there is no split '{name}'; there are: {there}{nearest(name, self.splits())}"
            )
        mark = self.marks.get(name) or hashlib.sha256(f"{self.fingerprint} {name}".encode()).hexdigest()
        return replace(self, examples=chosen, fingerprint=mark)

    def image(self, example: Example) -> np.ndarray:
        """The picture: (height, width, 3) uint8 RGB. Raises UnreadableImage."""
        return self.reader(example)


def clean(captions: Iterable[object]) -> tuple[str, ...]:
    """Captions with white space folded; what is no text, or holds no letter and no digit, is left out. Half a character, as JSON can spell
    one, becomes a question mark."""
    folded = (" ".join(caption.split()).encode("utf-8", "replace").decode() for caption in captions if isinstance(caption, str))
    return tuple(caption for caption in folded if any(map(str.isalnum, caption)))


def check(examples: Sequence[Example], where: str) -> None:
    """Raises DataError for an empty set, an image that is listed twice, and an image without captions."""
    if not examples:
        raise DataError(f"{where} holds no captions: choose another file with --set data.captions=PATH")
    counts = Counter(example.image_id for example in examples)
    double = [name for name, count in counts.items() if count > 1]
    if double:
        raise DataError(f"{where} lists {_some(double)} more than once; list each once, with all its captions")
    bare = [example.image_id for example in examples if not example.captions]
    if bare:
        raise DataError(f"{where} has no captions of {_some(bare)}; give each at least one, or remove it")


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ("image " if len(names) == 1 else f"{len(names)} images: ") + ", ".join(names[:shown]) + more


def hashed_split(name: str) -> str:
    """A split for an image whose data set has none: train, val, test at 80, 10, 10 %, by a hash of its name alone."""
    draw = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if draw < 80 else "val" if draw < 90 else "test"


def limited(examples: Sequence[Example], limits: dict[str, int | None], seed: int) -> list[Example]:
    """Keeps, of each split with a limit N, the first N of its seeded shuffle, in their old order."""
    kept = list(examples)
    for split, limit in limits.items():
        names = sorted(example.image_id for example in examples if example.split == split)
        if limit is None or limit >= len(names):
            continue
        if limit < 1:
            raise DataError(f"the number of {split} images is {limit}; it must be at least 1")
        random.Random(f"{split} {seed}").shuffle(names)
        wanted = set(names[:limit])
        kept = [example for example in kept if example.split != split or example.image_id in wanted]
    return kept


def fingerprint(source: str, examples: Iterable[Example], contents: dict[str, str]) -> str:
    """SHA-256 (hex) over source, image names, splits, captions and `contents` (a digest per image name), in order.

    Folders and times of files have no part in it: a copy of a data set has the same fingerprint.
    """
    digest = hashlib.sha256(json.dumps(["captions", source]).encode())
    for example in examples:
        line = [example.image_id, example.split, example.captions, contents.get(example.image_id)]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()
