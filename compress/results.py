"""Captions that some model wrote, in COCO's results format, matched with the references of the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.data.captions import clean
from compress.data.karpathy import text_of
from compress.errors import DataError, beside, nearest

KARPATHY_IDS = ("cocoid", "imgid", "filename")  # what a results file may call an image of a Karpathy file


def read(candidates: Path, references: Path, subset: bool = False) -> tuple[list[str], list[list[str]]]:
    """(one caption, its references) per image, in the order of the references.

    COCO: every annotated image must have a caption. Karpathy: every image of the splits that the candidates touch. With `subset`, images
    without a caption are left out. Raises DataError, in one line, for an image without a caption, with two, or that the references do not
    know.
    """
    written = _candidates(candidates)
    wanted = _references(references, written)
    unknown = [name for name in written if name not in wanted]
    if unknown:
        close = nearest(unknown[0], wanted)
        raise DataError(f"{candidates}: image_id {unknown[0]} is not in {references} ({len(unknown)} such ids){close}")
    if subset:
        wanted = {name: captions for name, captions in wanted.items() if name in written}
    missing = [name for name in wanted if name not in written]
    if missing:
        such = f"no caption for image_id {missing[0]} of {references} ({len(missing)} such ids)"
        raise DataError(f"{candidates}: {such}; --subset scores the images that have one")
    return [written[name] for name in wanted], list(wanted.values())


def _candidates(path: Path) -> dict[str, str]:
    entries = _json(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path}: a results file is a list of {{"image_id": ..., "caption": ...}} with at least one entry')
    captions: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry or not isinstance(entry.get("caption"), str):
            raise DataError(f'{path}: entry {number} is not {{"image_id": ..., "caption": "text"}}')
        name = str(entry["image_id"])
        if name in captions:
            raise DataError(f"{path}: image_id {name} has two captions; give one per image")
        captions[name] = entry["caption"]
    return captions


def _references(path: Path, written: Mapping[str, str]) -> dict[str, list[str]]:
    value = _json(path)
    try:
        if isinstance(value, dict) and "annotations" in value:
            wanted: dict[str, list[str]] = {}
            for annotation in value["annotations"]:
                wanted.setdefault(str(annotation["image_id"]), []).extend(clean([annotation["caption"]]))
        elif isinstance(value, dict) and isinstance(value.get("images"), list):
            wanted = _karpathy(path, value["images"], written)
        else:
            raise DataError(f"{path}: is neither COCO JSON (key 'annotations') nor Karpathy JSON (key 'images' with sentences)")
    except KeyError as error:
        raise DataError(f"{path}: an entry lacks {error}; COCO and Karpathy JSON are read") from None
    except (TypeError, AttributeError):
        raise DataError(f"{path}: an entry is no JSON object where COCO and Karpathy JSON have one") from None
    if not wanted:
        raise DataError(f"{path}: holds no reference caption")
    if bare := next((name for name, captions in wanted.items() if not captions), None):
        raise DataError(f"{path}: image {bare} has no reference caption")
    return wanted


def _karpathy(path: Path, images: Sequence[Mapping], written: Mapping[str, str]) -> dict[str, list[str]]:
    def matches(key: str) -> tuple[int, int]:
        return sum(str(image.get(key)) in written for image in images), sum(key in image for image in images)

    key = max(KARPATHY_IDS, key=matches)
    split = {str(image[key]): image.get("split") for image in images if key in image}
    touched = {split[name] for name in written if name in split}
    wanted: dict[str, list[str]] = {}
    for image in images:
        if key in image and (not touched or image.get("split") in touched):
            if (name := str(image[key])) in wanted:
                raise DataError(f"{path}: lists image {name} more than once; list each once, with all its captions")
            wanted[name] = list(clean(map(text_of, image["sentences"])))
    return wanted


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}){nearest(path.name, beside(path))}") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    except RecursionError:
        raise DataError(f"{path}: is JSON nested too deeply") from None
