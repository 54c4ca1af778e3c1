"""Regions of images: labelled ones to train the concept extractor with, and a detector's proposals.

Labelled regions are read from Visual Genome's objects.json, whose image sizes stand in image_data.json,

    [{"image_id": 1, "objects": [{"object_id": 7, "x": 10, "y": 20, "w": 30, "h": 40, "names": ["tree"]}, ...]}, ...]
    [{"image_id": 1, "width": 800, "height": 600, "url": ...}, ...]

or from COCO's instances_*.json,

    {"images": [{"id": 9, "file_name": "a.jpg", "width": 640, "height": 480}, ...], "categories": [{"id": 3, "name": "car"}, ...],
     "annotations": [{"image_id": 9, "category_id": 3, "bbox": [x, y, w, h]}, ...]}

and a detector's boxes, of any classes or none, from COCO's results format:

    [{"image_id": 9, "bbox": [x, y, w, h], "score": 0.87}, ...]

In all of them x, y, w, h are pixels of the original image, from its upper left corner. Here a box is (x0, y0, x1, y1) as shares of the
image's width and height, 0 to 1, so that it fits a grid of any size. What reaches beyond the image is cut off.

An image's key is its file name for COCO, as `Example.image_id` is, and the image id as text ("2407") for Visual Genome; `of_image` finds
the regions of one that is named otherwise.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from compress.data import layout
from compress.data.concepts import Mentions
from compress.errors import DataError

LABELLED = "Visual Genome's objects.json (image_id, objects) or COCO's instances_*.json (images, annotations, categories)"
SIZES = "Visual Genome's image_data.json (image_id, width, height) or COCO's instances_*.json (images with file_name, width, height)"
BOXES = "a list of boxes in COCO's results format (image_id, bbox, score)"
FAR = 1e9  # no pixel and no score is beyond; JSON as Python reads it has NaN, Infinity and integers of any length


@dataclass(frozen=True, slots=True)
class Region:
    """`box`: (x0, y0, x1, y1), shares of width and height with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1. `concept`: its number in the
    list of concepts, None for a proposal. `score`: the detector's, 1.0 for a label."""

    box: tuple[float, float, float, float]
    concept: int | None
    score: float


class Regions(dict[str, tuple[Region, ...]]):
    """Regions by image key; images without any are absent. Also what was left out on the way.

    `unnamed` counts the names that stand for no concept; `empty` is the number of boxes without an area within their image. `coco_ids`
    gives the key of an image of COCO by its id there.
    """

    def __init__(
        self, found: Mapping[str, Sequence[Region]], unnamed: Counter[str], empty: int, coco_ids: Mapping[str, str] | None = None
    ) -> None:
        super().__init__((key, tuple(regions)) for key, regions in found.items())
        self.unnamed = unnamed
        self.empty = empty
        self.coco_ids = coco_ids or {}

    def of_image(self, image_id: str) -> tuple[Region, ...]:
        """Those of the image with this key or file name (2407.jpg is Visual Genome's 2407), or with COCO's id in its name, of either year
        (COCO_val2014_000000000009.jpg and 000000000009.jpg are one image); of one without any: none."""
        stem = PurePosixPath(image_id).stem
        for key in (image_id, stem, self.coco_ids.get(_coco_id(stem) or "")):
            if key in self:
                return self[key]
        return ()


def sizes_beside(path: str | Path) -> Path:
    """Where Visual Genome keeps the sizes of the images whose objects `path` lists, if nothing else is said."""
    return Path(os.path.expanduser(path)).with_name("image_data.json")


def read_regions(files: Sequence[str | Path], concepts: Sequence[str], image_data: str | Path | None = None) -> Regions:
    """The labelled regions of a file, or of COCO's of several years, with score 1, in the files' order; the content tells which format it
    is.

    A region's concept is what its name stands for (`Mentions.named`; of several names, the first that stands for one). `image_data`
    names Visual Genome's image_data.json, by default the one beside objects.json; COCO's file has the sizes itself.
    Raises DataError for a file that is absent, no JSON or of another layout, for an entry without what the format asks for, an image
    or category that is not listed, and where no region is left.
    """
    named = functools.cache(Mentions(concepts).named)  # Visual Genome repeats a few ten thousand names millions of times
    found = [_labelled(Path(os.path.expanduser(path)), named, image_data, alone=len(files) == 1) for path in files]
    regions: dict[str, tuple[Region, ...]] = {}
    for key, its in (pair for one in found for pair in one.items()):
        regions[key] = regions.get(key, ()) + its
    unnamed, empty = sum((one.unnamed for one in found), Counter()), sum(one.empty for one in found)
    if not regions:
        names = ", ".join(f"'{name}'" for name, _ in unnamed.most_common(5))
        why = f" ({empty} empty boxes; names that are no concept: {names})" if names else f" ({empty} empty boxes)"
        raise DataError(f"{', '.join(map(str, files))} has no region that is of a concept{why}: choose another file, or add concepts to "
                        "the list")
    return Regions(regions, unnamed, empty, {coco: key for one in found for coco, key in one.coco_ids.items()})


def _labelled(path: Path, named: Callable[[str], int | None], image_data: str | Path | None, alone: bool) -> Regions:
    found = _json(path, LABELLED)
    if isinstance(found, list) and found and isinstance(found[0], dict) and "objects" in found[0]:
        if not alone:  # an image of COCO has a key of its own there
            raise DataError(f"{path} is of Visual Genome, which is read by itself; several files are COCO's instances_*.json")
        return _visual_genome(path, found, named, image_data)
    if isinstance(found, dict) and all(isinstance(found.get(key), list) for key in ("images", "annotations", "categories")):
        return _coco(path, found, named)
    raise _mismatch(path, _what(found), LABELLED)


def read_sizes(path: str | Path) -> dict[str, tuple[int, int]]:
    """(width, height) in pixels by image key, from Visual Genome's image_data.json or COCO's JSON. Raises DataError as `read_regions`."""
    path = Path(os.path.expanduser(path))
    found = _json(path, SIZES)
    if isinstance(found, dict) and isinstance(found.get("images"), list):
        return {name: size for name, size in _coco_images(path, found["images"]).values()}
    if not isinstance(found, list) or not found or not isinstance(found[0], dict) or "width" not in found[0]:
        raise _mismatch(path, _what(found), SIZES)
    sizes: dict[str, tuple[int, int]] = {}
    for number, image in enumerate(found):
        key, size = _id(image, "image_id"), _size(image)
        if key is None or size is None:
            raise _mismatch(path, f"JSON whose [{number}] has no 'image_id', 'width' and 'height'", SIZES)
        if key in sizes:
            raise DataError(f"{path} lists image id {key} more than once; each image must stand there once")
        sizes[key] = size
    return sizes


def read_boxes(path: str | Path, sizes: Mapping[str, tuple[int, int]]) -> Regions:
    """A detector's boxes, the best score first, without concepts; `sizes` gives (width, height) in pixels by image key.

    An `image_id` is an image's key, or its name without folder and extension, zeros in front of a number aside: 9 is 000000000009.jpg,
    and also COCO_val2014_000000000009.jpg. Raises DataError as `read_regions`, and for an image that `sizes` does not have.
    """
    path = Path(os.path.expanduser(path))
    found = _json(path, BOXES)
    if not isinstance(found, list) or not found or not isinstance(found[0], dict) or "bbox" not in found[0]:
        raise _mismatch(path, _what(found), BOXES)
    short = _short_names(sizes)
    regions: dict[str, list[Region]] = {}
    empty = 0
    for number, entry in enumerate(found):
        found[number] = None  # a million boxes: what was read is let go
        key, pixels = _id(entry, "image_id"), _pixels(entry)
        if key is None or pixels is None or not _is_number(entry.get("score")) or not -FAR < entry["score"] < FAR:
            raise _mismatch(path, f"JSON whose [{number}] has no 'image_id', 'bbox' (four numbers) and 'score' (a number)", BOXES)
        name = key if key in sizes else short.get(key)
        if name is None:
            raise DataError(
                f"{path}: [{number}] is of image id {key}, which is none of the {len(sizes)} images': run the detector on the images that "
                f"the captions name, with their file names or COCO's ids as image_id"
            )
        if box := _normalized(*pixels, *sizes[name]):
            regions.setdefault(name, []).append(Region(box, None, float(entry["score"])))
        else:
            empty += 1
    for its in regions.values():
        its.sort(key=lambda region: -region.score)
    return Regions(regions, Counter(), empty, _ids_in_names(regions))


def _visual_genome(path: Path, found: list, named: Callable[[str], int | None], image_data: str | Path | None) -> Regions:
    listed = sizes_beside(path) if image_data is None else Path(os.path.expanduser(image_data))
    if not listed.exists():
        raise DataError(
            f"{path} is of Visual Genome, which keeps the sizes of its images in image_data.json, and there is no {listed}: "
            f"put image_data.json beside {path.name}, or name it"
        )
    sizes = read_sizes(listed)
    regions: dict[str, list[Region]] = {}
    unnamed: Counter[str] = Counter()
    empty = 0
    for number, image in enumerate(found):
        found[number] = None  # the parsed file takes gigabytes: what was read is let go
        key = _id(image, "image_id")
        if key is None or not isinstance(image.get("objects"), list):
            raise _mismatch(path, f"JSON whose [{number}] has no 'image_id' and 'objects'", LABELLED)
        if key not in sizes:
            raise DataError(
                f"{path}: [{number}] is of image id {key}, which {listed} does not list: take both files from one version of Visual Genome"
            )
        for place, thing in enumerate(image["objects"]):
            pixels = _pixels(thing)
            names = thing.get("names") if pixels else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise _mismatch(path, f"JSON whose [{number}].objects[{place}] has no 'x', 'y', 'w', 'h' and 'names'", LABELLED)
            concept = next((concept for name in names if (concept := named(name)) is not None), None)
            box = _normalized(*pixels, *sizes[key])
            if box is None:
                empty += 1
            elif concept is None:
                unnamed[names[0] if names else ""] += 1
            else:
                regions.setdefault(key, []).append(Region(box, concept, 1.0))
    return Regions(regions, unnamed, empty, _coco_ids(listed))


def _coco_ids(image_data: Path) -> dict[str, str]:
    """Visual Genome's id by COCO's, of the images that both have."""
    listed = _json(image_data, SIZES)
    if not isinstance(listed, list):  # sizes from COCO's file
        return {}
    return {coco: key for image in listed if (coco := _id(image, "coco_id")) is not None and (key := _id(image, "image_id")) is not None}


def _coco(path: Path, found: dict, named: Callable[[str], int | None]) -> Regions:
    images = _coco_images(path, found["images"])
    categories: dict[str, str] = {}
    for number, category in enumerate(found["categories"]):
        key = _id(category, "id")
        if key is None or not isinstance(category.get("name"), str):
            raise _mismatch(path, f"JSON whose categories[{number}] has no 'id' and 'name'", LABELLED)
        categories[key] = category["name"]
    regions: dict[str, list[Region]] = {}
    unnamed: Counter[str] = Counter()
    empty = 0
    for number, annotation in enumerate(found["annotations"]):
        found["annotations"][number] = None  # outlines of objects are most of the file, and no part of a region
        image, category, pixels = _id(annotation, "image_id"), _id(annotation, "category_id"), _pixels(annotation)
        if image is None or category is None or pixels is None:
            raise _mismatch(path, f"JSON whose annotations[{number}] has no 'image_id', 'category_id' and 'bbox' (four numbers)", LABELLED)
        if image not in images:
            raise DataError(f"{path}: annotations[{number}] is of image id {image}, which 'images' does not list: fetch it again")
        if category not in categories:
            raise DataError(f"{path}: annotations[{number}] is of category id {category}, which 'categories' does not list: fetch it again")
        name, size = images[image]
        concept, box = named(categories[category]), _normalized(*pixels, *size)
        if box is None:
            empty += 1
        elif concept is None:
            unnamed[categories[category]] += 1
        else:
            regions.setdefault(name, []).append(Region(box, concept, 1.0))
    return Regions(regions, unnamed, empty, _ids_in_names(regions))


def _coco_images(path: Path, listed: list) -> dict[str, tuple[str, tuple[int, int]]]:
    """File name and (width, height) by image id."""
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    for number, image in enumerate(listed):
        key, size = _id(image, "id"), _size(image)
        if key is None or size is None or not isinstance(image.get("file_name"), str):
            raise _mismatch(path, f"JSON whose images[{number}] has no 'id', 'file_name', 'width' and 'height'", SIZES)
        if key in images:
            raise DataError(f"{path} lists image id {key} more than once; each image must stand there once")
        images[key] = image["file_name"], size
    return images


def _short_names(keys: Mapping[str, object]) -> dict[str, str]:
    """Image keys by their name without folder and extension and by COCO's id in it; what stands for two images is left out."""
    found: dict[str, set[str]] = {}
    for key in keys:
        stem = PurePosixPath(key).stem
        for short in (stem, str(int(stem)) if stem.isdecimal() else _coco_id(stem) or stem):
            found.setdefault(short, set()).add(key)
    return {short: next(iter(its)) for short, its in found.items() if len(its) == 1}


def _coco_id(stem: str) -> str | None:
    """COCO's image id in a file name of 2014 or 2017 without its extension: twelve digits, alone or after an underscore."""
    digits = stem[-12:]
    return str(int(digits)) if len(digits) == 12 and digits.isdecimal() and stem[-13:-12] in ("", "_") else None


def _ids_in_names(keys: Iterable[str]) -> dict[str, str]:
    """Image keys by COCO's id in their names, as far as they have one."""
    return {coco: key for key in keys if (coco := _coco_id(PurePosixPath(key).stem)) is not None}


def _normalized(x: float, y: float, w: float, h: float, width: int, height: int) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) in shares of the image; None for a box that has no area within it, or coordinates that are no finite number."""
    if not all(-FAR < value < FAR for value in (x, y, w, h)) or w <= 0 or h <= 0:
        return None
    x0, y0, x1, y1 = max(x / width, 0.0), max(y / height, 0.0), min((x + w) / width, 1.0), min((y + h) / height, 1.0)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pixels(entry: object) -> list[float] | None:
    """x, y, w, h of `bbox`, or of the entry itself."""
    if not isinstance(entry, dict):
        return None
    values = entry["bbox"] if "bbox" in entry else [entry.get(key) for key in "xywh"]
    return values if isinstance(values, list) and len(values) == 4 and all(map(_is_number, values)) else None


def _id(entry: object, key: str) -> str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _size(image: object) -> tuple[int, int] | None:
    size = (image.get("width"), image.get("height")) if isinstance(image, dict) else ()
    return size if size and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size) else None


def _json(path: Path, expects: str) -> dict | list:
    if path.is_dir():
        raise _mismatch(path, "a folder", expects)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; expected is {expects}") from None
    except UnicodeDecodeError:
        raise _mismatch(path, "no UTF-8 text (if it is an archive, unpack it)", expects) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected is {expects}") from None
    except json.JSONDecodeError as error:
        what = f"no JSON ({error.msg}, line {error.lineno}; if it is half a download, fetch it again)"
        raise _mismatch(path, what if error.doc.strip() else "an empty file", expects) from None
    except ValueError as error:  # a number of thousands of digits
        raise _mismatch(path, f"no JSON ({error})", expects) from None
    except RecursionError:
        raise _mismatch(path, "JSON nested too deeply", expects) from None


def _what(found: object) -> str:
    """What a JSON value is, for an error: "a list whose first entry is a JSON object with 'image_id', 'bbox'"."""
    if isinstance(found, dict):
        return layout.keys(found)
    if not isinstance(found, list):
        return "JSON that is neither a list nor an object"
    if not found:
        return "an empty list"
    return f"a list whose first entry is {layout.keys(found[0])}" if isinstance(found[0], dict) else "a list, but not of objects"


def _mismatch(path: Path, found: str, expects: str) -> DataError:
    return DataError(f"{path} is {found}; expected is {expects}")
