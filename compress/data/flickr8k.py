"""Flickr8k as distributed: Flickr8k.token.txt with lines `file.jpg#0<TAB>caption`, and beside it the official splits.

Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt (val) and Flickr_8k.testImages.txt hold one file name a line. At
least one of them must be there. Images on no list are left out, as the official splits do.
"""

from __future__ import annotations

from pathlib import Path

from compress.data import layout
from compress.data.captions import Example, clean
from compress.errors import DataError

SOURCE = "flickr8k"
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset")


def read(data) -> tuple[str, list[Example], dict[str, Path], bool]:
    """Name, examples, the image file of each, and False: the splits are the lists' own. `data.captions` is the token file,
    or the folder that holds it."""
    path = layout.wanted(data.captions, "captions", SOURCE, "Flickr8k.token.txt")
    if path.is_dir() and (path / "Flickr8k.token.txt").exists():
        path = path / "Flickr8k.token.txt"
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(layout.read_text(path, SOURCE).split("\n"), 1):
        if not line.strip():
            continue
        mark, tab, caption = line.partition("\t")
        name, hash_sign, _ = mark.rpartition("#")
        if not tab or not hash_sign:
            raise layout.mismatch(path, SOURCE, f"text whose line {number} is '{line[:40]}'")
        captions.setdefault(name.strip(), []).append(caption)
    folder = layout.pictures(data.images, SOURCE, path, FOLDERS)
    lists = {split: path.parent / name for split, name in LISTS.items() if (path.parent / name).exists()}
    if captions and not lists:
        raise DataError(
            f"data.captions: beside {path} there is none of {', '.join(LISTS.values())}, which hold the splits"
        )
    examples, seen = [], {}
    for split, listed in lists.items():
        for name in map(str.strip, layout.read_text(listed, SOURCE).split("\n")):
            if name:
                if name in seen:
                    raise DataError(f"{listed} lists {name}, which {seen[name].name} has already; list each image once")
                seen[name] = listed
                examples.append(Example(name, split, clean(captions.get(name, ()))))
    files = {example.image_id: folder / example.image_id for example in examples}
    return path.name, examples if captions else [], files, False
