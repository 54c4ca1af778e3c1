"""COCO's annotation JSON (captions_train2017.json): images by id, and one annotation per caption.

    {"images": [{"id": 9, "file_name": "a.jpg"}, ...], "annotations": [{"image_id": 9, "caption": "A dog."}, ...]}

`data.captions` may name several files, separated by commas. The split is the first word for one (`train`, `Val`,
`validation`) in the file's name. A single file without such a word is split by a hash of each image id: 80 % train,
10 % val, 10 % test, the same ones every time.
"""

from __future__ import annotations

import re
from pathlib import Path

from compress.data import layout
from compress.data.captions import SPLITS, Example, clean, hashed_split
from compress.data.photos import find
from compress.errors import DataError

SOURCE = "coco"


def read(data) -> tuple[str, list[Example], dict[str, Path], bool]:
    """Name, examples, the image file of each (in the folder itself or in one named as in COCO, `val2017`), and whether the
    splits were drawn."""
    names = [part.strip() for part in (data.captions or "").split(",") if part.strip()] or [None]
    paths = [layout.wanted(name, "captions", SOURCE, "COCO's annotation JSON") for name in names]
    folder = layout.pictures(data.images, SOURCE, paths[0])
    examples, files = [], {}
    for path in paths:
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", path.stem)]  # whole ones: not `latest`
        split = next((name for word in words if (name := SPLITS.get(word, word)) in ("train", "val", "test")), None)
        if not split and len(paths) > 1:
            raise DataError(
                f"data.captions: the name of {path} says neither train, val nor test; of several files each must"
            )
        added = _file(path, split)
        examples += added
        years = [folder_name.group()] if (folder_name := re.search(r"(train|val|test)\d{4}", path.name.lower())) else []
        files |= find(folder, [example.image_id for example in added], years)
    return ",".join(path.name for path in paths), examples, files, not split


def _file(path: Path, split: str | None) -> list[Example]:
    found = layout.read_json(path, SOURCE)
    if not isinstance(found.get("images"), list) or not isinstance(found.get("annotations"), list):
        raise layout.mismatch(path, SOURCE, layout.keys(found))
    captions: dict[object, list[object]] = {}
    names: dict[object, str] = {}
    for number, image in enumerate(found["images"]):
        if (
            not isinstance(image, dict)
            or not isinstance(image.get("file_name"), str)
            or not isinstance(image.get("id"), int | str)
        ):
            raise layout.mismatch(path, SOURCE, f"JSON whose images[{number}] has no 'id' and 'file_name'")
        if image["id"] in names:
            raise DataError(f"{path} lists image id {image['id']} more than once; each image must stand there once")
        names[image["id"]] = image["file_name"]
        captions[image["id"]] = []
    for number, annotation in enumerate(found["annotations"]):
        if not isinstance(annotation, dict) or "caption" not in annotation or not isinstance(annotation.get("image_id"), int | str):
            raise layout.mismatch(path, SOURCE, f"JSON whose annotations[{number}] has no 'image_id' and 'caption'")
        if annotation["image_id"] not in captions:
            raise DataError(
                f"{path}: annotations[{number}] is of image id {annotation['image_id']!r}, which 'images' does not list"
            )
        captions[annotation["image_id"]].append(annotation["caption"])
    return [Example(name, split or hashed_split(str(key)), clean(captions[key])) for key, name in names.items()]
