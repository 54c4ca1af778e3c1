"""Karpathy's JSON: one file for a whole data set (dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json).

    {"images": [{"filename": "a.jpg", "split": "train", "filepath": "val2014", "sentences": [{"raw": "A dog ."}]}]}

`filepath`, a sub-folder, is COCO's alone; where several have a photo of one name, it is part of their names. A sentence
without `raw` is joined from its `tokens`. Split `restval` joins `train`.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from compress.data import layout
from compress.data.captions import Example, clean

SOURCE = "karpathy"


def read(data) -> tuple[str, list[Example], dict[str, Path], bool]:
    """Name, examples, the image file of each (without `data.images` in the folder `images` beside the captions), and False: the splits are
    the file's own."""
    path = layout.wanted(data.captions, "captions", SOURCE, "Karpathy's JSON")
    found = layout.read_json(path, SOURCE)
    images = found.get("images")
    if not isinstance(images, list):
        raise layout.mismatch(path, SOURCE, layout.keys(found))
    folder = layout.pictures(data.images, SOURCE, path)
    examples, files = [], {}
    times = Counter(image.get("filename") for image in images if isinstance(image, dict) and isinstance(image.get("filename"), str))
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
            raise layout.mismatch(path, SOURCE, f"JSON whose images[{number}] has no 'sentences'")
        for key in ("filename", "split"):
            if not isinstance(image.get(key), str):
                raise layout.mismatch(path, SOURCE, f"JSON whose images[{number}] has no '{key}'")
        name, under = image["filename"], str(image.get("filepath") or "")
        split = "train" if image["split"] == "restval" else image["split"]
        key = f"{under}/{name}" if under and times[name] > 1 else name
        examples.append(Example(key, split, clean(text_of(sentence) for sentence in image["sentences"])))
        nested = folder / under / name
        files[key] = nested if os.path.exists(nested) else folder / name
    return path.name, examples, files, False


def text_of(sentence: object) -> str | None:
    """What an entry of `sentences` says; None where it says nothing."""
    if not isinstance(sentence, dict):
        return None
    tokens = sentence.get("tokens")
    raw = sentence.get("raw")
    return raw if isinstance(raw, str) else " ".join(map(str, tokens)) if isinstance(tokens, list) else None
