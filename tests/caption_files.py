"""Caption sets on disk, small and of each layout, and the one line that says what is wrong with them."""

import json

import pytest
from PIL import Image

from compress.config import Data
from compress.data import load
from compress.errors import DataError

NAMES = ["a.jpg", "b.avif", "c.jpg", "d.jpg", "e.jpg", "f.avif"]
KARPATHY_SPLITS = ["train", "restval", "val", "test", "train", "val"]
SPLITS = ["train", "train", "val", "test", "train", "val"]


def captions_of(name):
    return [f"A {name[0]} sits here .", f"there is  a {name[0]}"]


def picture(folder, name, colour=(200, 30, 40), size=(24, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name, quality=95)


def karpathy(tmp_path):
    """Six images in Karpathy's layout; returns a function that gives `Data`, after `change` has edited the JSON."""
    folder = tmp_path / "set"
    for number, name in enumerate(NAMES):
        picture(folder / "images", name, (40 * number, 90, 200))
    images = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": text, "tokens": text.split()} for text in captions_of(name)],
        }
        for name, split in zip(NAMES, KARPATHY_SPLITS, strict=True)
    ]
    found = {"dataset": "small", "images": images}

    def write(change=None, **settings):
        if change:
            change(found["images"])
        (folder / "dataset.json").write_text(json.dumps(found))
        return Data(**{"source": "karpathy", "captions": str(folder / "dataset.json"), **settings})

    return write


def write_coco(path, names, first=10):
    images = [{"id": first + number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"image_id": image["id"], "caption": text} for image in images for text in captions_of(image["file_name"])]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes[::-1]}))


def write_flickr8k(folder):
    lines = [f"{name}#{k}\t{text}" for name in NAMES for k, text in enumerate(captions_of(name))]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        listed = [image for image, its in zip(NAMES, SPLITS, strict=True) if its == split]
        (folder / f"Flickr_8k.{name}Images.txt").write_text("\n".join(listed) + "\n")


def fails(data, cache=None):
    with pytest.raises(DataError) as error:
        load(data, cache)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    return str(error.value)
