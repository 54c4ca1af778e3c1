"""Tells caption files apart, and words the errors of a file that is not what its source expects."""

from __future__ import annotations

import json
import os
from pathlib import Path

from compress.errors import DataError, beside, nearest

EXPECTS = {
    "karpathy": "a JSON object with 'images', each with 'filename', 'split' and 'sentences'",
    "coco": "a JSON object with 'images' (id, file_name) and 'annotations' (image_id, caption)",
    "flickr8k": "lines 'file.jpg#0<TAB>caption', as in Flickr8k.token.txt",
    "datasets": "a folder of images with metadata.csv or metadata.jsonl, or the name of a dataset",
}


def wanted(value: str | None, key: str, source: str, what: str) -> Path:
    """The path in `data.<key>`. Raises DataError where it is not set or not there."""
    if not value:
        raise DataError(f"data.{key} is not set, and source '{source}' needs it: --set data.{key}=PATH ({what})")
    path = Path(os.path.expanduser(value))
    if not os.path.exists(path):
        near = nearest(path.name, beside(path))
        raise DataError(f"data.{key}: there is no file or folder {path}: --set data.{key}=PATH ({what}){near}")
    return path


def pictures(value: str | None, source: str, captions: Path, names: tuple[str, ...] = ("images",)) -> Path:
    """The folder in `data.images`, or, where that is not set, the first folder of these names beside the captions."""
    if not value:
        found = [captions.parent / name for name in names if (captions.parent / name).is_dir()]
        if found:
            return found[0]
        raise DataError(
            f"data.images is not set, and there is no folder '{names[0]}' beside {captions}: --set data.images=FOLDER"
        )
    folder = wanted(value, "images", source, "the folder of the images")
    if not folder.is_dir():
        raise DataError(
            f"data.images: {folder} is a file; the folder of the images is wanted: --set data.images=FOLDER"
        )
    return folder


def read_text(path: Path, source: str) -> str:
    if path.is_dir():
        raise mismatch(path, source, "a folder")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise mismatch(path, source, "no UTF-8 text") from None
    except OSError as error:
        raise DataError(f"data.captions: {path} cannot be read: {error.strerror}") from None


def read_json(path: Path, source: str) -> dict:
    """The JSON object in a file. Raises DataError that says what was found instead."""
    text = read_text(path, source)
    try:
        found = json.loads(text)
    except ValueError as error:
        what = (
            f"no JSON ({error.msg}, line {error.lineno})"
            if isinstance(error, json.JSONDecodeError)
            else f"no JSON ({error})"
        )
        raise mismatch(path, source, what if text.strip() else "an empty file") from None
    except RecursionError:
        raise mismatch(path, source, "JSON nested too deeply") from None
    if not isinstance(found, dict):
        raise mismatch(path, source, f"JSON that is {_kind(found)}, not an object")
    return found


def mismatch(path: Path, source: str, found: str) -> DataError:
    """The error for a file of another layout; names the source whose file it looks like."""
    other = guess(str(path))
    hint = f"; it looks like source '{other}': --set data.source={other}" if other and other != source else ""
    return DataError(f"data.captions: {path} is {found}; source '{source}' expects {EXPECTS[source]}{hint}")


def guess(value: str) -> str | None:
    """The source whose captions these look like (of several files with commas, the first): karpathy, coco, flickr8k, datasets, or None."""
    path = Path(os.path.expanduser(value if os.path.exists(value) else value.split(",")[0]))
    if os.path.isdir(path):
        if any((path / f"metadata.{kind}").exists() for kind in ("csv", "jsonl", "parquet")):
            return "datasets"
        return "flickr8k" if (path / "Flickr8k.token.txt").exists() else None
    if path.name in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        return "datasets"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    first = text.lstrip().split("\n", 1)[0]
    if "\t" in first and "#" in first.split("\t")[0] and not first.startswith("{"):
        return "flickr8k"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        return None
    if isinstance(found.get("annotations"), list):
        return "coco"
    first = next(iter(found["images"]), None)
    return "karpathy" if isinstance(first, dict) and "sentences" in first else None


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "a boolean"}.get(type(value), "a number")


def keys(found: dict) -> str:
    """What an object holds, for an error: "an object with 'a', 'b'"."""
    names = list(found)
    shown = ", ".join(f"'{name}'" for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return f"a JSON object with {shown}" if names else "an empty JSON object"
