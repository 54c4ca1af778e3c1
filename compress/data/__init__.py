"""Caption sets, from files of several layouts or made from a seed: `load(data)` reads what a recipe's `data` names."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from compress.data import coco, flickr8k, folder, karpathy, photos, scenes
from compress.data.captions import CaptionSet, Example, UnreadableImage, check, limited
from compress.errors import DataError, nearest

__all__ = ["CaptionSet", "Example", "SOURCES", "UnreadableImage", "load"]


def load(data, cache: Path | None = None, only: str | None = None, or_all: bool = False, progress=None) -> CaptionSet:
    """The caption set that `data` (`compress.config.Data`) names; relative paths start at the current folder.

    Of `train` and of `data.val_split`, `train_images` and `val_images` take the first N of a shuffle seeded by
    `data.seed`. With `only`, the images of that split alone; with `or_all`, too, all images, as that split, where there is
    no choice: the captions say no splits, or name one and no other. The images left are all decoded once; those that
    cannot be are named in `.unreadable`. In `cache`, a folder, the outcome is kept for the next time; `progress`
    (`compress.context.Progress`) is told how far it is. Raises DataError,
    in one line that says how to mend it, for a wrong source, file, folder or layout, for an empty set, for images listed
    twice or without captions, and where more than `data.max_unreadable` of the images cannot be read.
    """
    if data.source not in SOURCES:
        raise DataError(
            f"data.source is '{data.source}'; there are: {', '.join(SOURCES)}{nearest(data.source, SOURCES)}"
        )
    return SOURCES[data.source](data, cache, only, or_all, progress)


def _photos(read, data, cache: Path | None, only: str | None, or_all: bool, progress) -> CaptionSet:
    if data.image_size is not None:
        raise DataError(
            f"data.image_size is for source 'scenes'; source '{data.source}' keeps its images as they are: remove it"
        )
    if not 0 <= data.max_unreadable <= 1:
        raise DataError(
            f"data.max_unreadable is {data.max_unreadable}; it is a share from 0 to 1: --set data.max_unreadable=0.01"
        )
    name, examples, contents, drawn = read(data)
    check(examples, name)
    if or_all and (drawn or len({example.split for example in examples}) == 1):
        if drawn and progress:
            progress.log(f"{name} says no splits: all {len(examples)} images are measured, also those that a model of these captions was "
                         f"trained on; name a split, such as {only}, where it was")
        examples = [replace(example, split=only) for example in examples]
    elif only is not None:
        examples = CaptionSet(tuple(examples), "", name).split(only).examples
    examples = limited(examples, {data.val_split: data.val_images} | {"train": data.train_images}, data.seed)
    return photos.readable(data.source, name, examples, contents, data.max_unreadable, cache, progress)


def _scenes(data, cache: Path | None, only: str | None, or_all: bool, progress) -> CaptionSet:
    for key in ("captions", "images"):
        if getattr(data, key):
            raise DataError(
                f"data.{key} is set, but source 'scenes' reads no file: --set data.source={_suggested(data)}"
            )
    found = scenes.load(data)
    return found if only is None else found.split(only)


def _suggested(data) -> str:
    from compress.data.layout import guess

    values = [value for value in (data.captions, data.images) if value]
    return next((found for found in map(guess, values) if found), "karpathy, coco, flickr8k or datasets")


SOURCES = {
    "karpathy": partial(_photos, karpathy.read),
    "coco": partial(_photos, coco.read),
    "flickr8k": partial(_photos, flickr8k.read),
    "datasets": partial(_photos, folder.read),
    "scenes": _scenes,
}
