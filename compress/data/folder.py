"""Image folders and data sets through Hugging Face `datasets`: rows with an image column and a caption column.

`data.images` is a folder with metadata.csv or metadata.jsonl (`file_name,caption`; "imagefolder"), a folder of Parquet
files or of `save_to_disk`, or the name of a data set on the hub. `data.captions` may name the caption column; without
it the first of CAPTIONS that is there is taken. A caption may be a text or a list of texts; rows of one file are one
image, and so are rows of a split that carry the same bytes under the same name, or under none.

The split is that of a column `split` where there is one, else the data set's own, or that in whose folder (`train`,
`val`, `test`) an image lies, where all lie in such. If there is one split alone, images are divided by a hash of their
names: 80 % train, 10 % val, 10 % test.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from compress.data.captions import SPLITS, Example, clean, hashed_split
from compress.errors import DataError, nearest

SOURCE = "datasets"
CAPTIONS = ("caption", "captions", "text", "texts", "sentences", "raw", "description")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".csv", ".jsonl", ".json", ".parquet", ".arrow", ".tar")  # what can hold captions


def read(data) -> tuple[str, list[Example], dict[str, Path | Callable[[], bytes]], bool]:
    """Name, examples, per image its file, or a function that gives its bytes where the data set carries them, and whether splits were
    drawn."""
    place, column = _place(data)
    folder = Path(os.path.expanduser(place))
    if folder.is_dir():
        # What datasets would keep of a folder is made in a moment and can go stale: a folder of its own each time.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            return _examples(_load(folder, scratch), place, folder, column)
    if folder.exists() or place.startswith(("/", "~", ".")) or place.count("/") > 1:
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"data.images: {folder} {what}; wanted is a folder or a data set's name: --set data.images=PATH"
        )
    return _examples(_load(place, None), place, None, column)


def _place(data) -> tuple[str, str | None]:
    """Folder or data set name, and caption column; a metadata file in `data.captions` stands for its folder."""
    captions = Path(os.path.expanduser(data.captions)) if data.captions else None
    if captions and captions.is_file():
        if captions.stem != "metadata":
            raise DataError(
                f"data.captions: {captions} is not metadata.csv or metadata.jsonl, which source '{SOURCE}' reads"
            )
        if data.images and captions.parent.resolve() != Path(os.path.expanduser(data.images)).resolve():
            raise DataError(
                f"data.captions: {captions} is not in {data.images}; source '{SOURCE}' reads {captions.name} in the folder of the images"
            )
        return str(captions.parent), None
    if captions and data.images and captions.is_dir() and captions.resolve() == Path(os.path.expanduser(data.images)).resolve():
        return data.images, None
    if data.images:
        return data.images, data.captions
    if data.captions:
        return data.captions, None
    raise DataError(
        f"data.images is not set, and source '{SOURCE}' needs it: --set data.images=PATH (a folder or a hub name)"
    )


def _load(place: Path | str, scratch: str | None) -> dict:
    """The splits of a data set as `datasets.Dataset`s, by name."""
    if isinstance(place, Path) and not any(path.suffix in TABLES for path in place.rglob("*")):
        raise DataError(
            f"data.images: {place} has no captions: write metadata.csv with the columns file_name,caption there"
        )
    import datasets

    bars, log = datasets.is_progress_bar_enabled(), logging.getLogger("huggingface_hub")
    level = log.level
    datasets.disable_progress_bars()
    log.setLevel(logging.ERROR)  # of each request that fails it says a line, and the last one is raised
    try:
        if isinstance(place, str):
            return dict(datasets.load_dataset(place))
        if (place / "dataset_dict.json").exists():
            return dict(datasets.load_from_disk(str(place)))
        if (place / "state.json").exists():
            return {"train": datasets.load_from_disk(str(place))}
        if any((place / name).is_file() for name in METADATA):  # all files: without, datasets takes those alone whose names say a split
            every = {"data_files": "**"}
        elif next(place.rglob("metadata.*"), None):
            every = {}
        else:
            return dict(datasets.load_dataset(str(place.resolve()), cache_dir=scratch))
        return dict(datasets.load_dataset("imagefolder", data_dir=str(place.resolve()), cache_dir=scratch, **every))
    except Exception as error:  # datasets raises anything at all, from ValueError to pyarrow's own; its cause, if any, says more
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"data.images: datasets cannot load {place}: {reason[0]}") from None
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _examples(splits: dict, place: str, folder: Path | None, column: str | None) -> tuple[str, list[Example], dict, bool]:
    import pyarrow.compute

    captions: dict[str, list] = {}
    shares: dict[str, str] = {}
    contents: dict[str, Path | Callable[[], bytes]] = {}
    digests: dict[str, str] = {}
    inside = None if folder is None else folder.resolve()
    single = len(splits) == 1
    for split, rows in splits.items():
        pictures, text = _columns(rows.features, place, column)
        marked = "split" if "split" in rows.features else None
        files = pyarrow.compute.struct_field(rows.data.table[pictures], "path").to_pylist()
        raw = _raw(rows, pictures)
        own = rows.select_columns([text, marked] if marked else [text])
        for number, row in enumerate(own):
            path = Path(files[number]) if files[number] else None
            if inside is not None and path is not None and path.is_relative_to(inside):
                name, content = path.relative_to(inside).as_posix(), path
            else:
                content = _bytes(raw, pictures, number)
                name = _named(split, path, number, content, contents, digests)
            found = row[text]
            captions.setdefault(name, []).extend(found if isinstance(found, list) else [found])
            contents.setdefault(name, content)
            share = _share(row[marked] if marked else split, name, place)
            if shares.setdefault(name, share) != share:
                raise DataError(f"data.images: {place} has {name} in the splits '{shares[name]}' and '{share}'; name one")
    folders = _folders(contents) if single and not marked else None
    drawn = single and not marked and folders is None
    shares = {name: hashed_split(name) for name in shares} if drawn else folders or shares
    examples = [Example(name, shares[name], clean(texts)) for name, texts in captions.items()]
    return Path(place).name, examples, contents, drawn


def _folders(contents: dict) -> dict[str, str] | None:
    """The split in whose folder each image lies; None where not all lie in such, or all in one."""
    tops = {name: Path(name).parts[0] for name, content in contents.items() if isinstance(content, Path)}
    found = {name: SPLITS.get(top, top) for name, top in tops.items()}
    splits = set(found.values())
    return found if len(found) == len(contents) and 1 < len(splits) and splits <= {"train", "val", "test"} else None


def _share(said: object, name: str, place: str) -> str:
    if said is None or said == "":
        raise DataError(f"data.images: {place} says no split of {name}; fill in its column 'split', or remove the column")
    return SPLITS.get(str(said), str(said))


def _columns(features: dict, place: str, column: str | None) -> tuple[str, str]:
    """The names of the image column and of the caption column."""
    import datasets

    pictures = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if pictures is None:
        raise DataError(f"data.images: {place} has no column of images; its columns are: {', '.join(features)}")
    there = ", ".join(sorted(features))
    if column and column not in features:
        raise DataError(
            f"data.captions: {place} has no column '{column}'; there are: {there}{nearest(column, features)}"
        )
    text = column or next((name for name in CAPTIONS if name in features), None)
    if text is None:
        raise DataError(
            f"data.images: {place} has no captions; its columns are: {there}; write metadata.csv with the columns "
            "file_name,caption into the folder, or name the column: --set data.captions=COLUMN"
        )
    return pictures, text


def _raw(rows, pictures: str):
    import datasets

    return rows.select_columns([pictures]).cast_column(pictures, datasets.Image(decode=False))


def _bytes(raw, pictures: str, number: int) -> Callable[[], bytes]:
    def content() -> bytes:
        found = raw[number][pictures] or {}
        if not found.get("bytes") and not found.get("path"):
            raise OSError("its row has no picture")
        return found["bytes"] or Path(found["path"]).read_bytes()

    return content


def _named(split: str, path: Path | None, number: int, content: Callable, contents: dict, digests: dict[str, str]) -> str:
    """The name of a picture that row `number` carries. Rows with the same bytes under the same name, or under none, are one picture; the
    hub's data sets name files without their folders, so that one name may be of several. `digests` grows with what had to be read."""
    if path is None:
        row, digest = f"{split}/row-{number:06d}", _digest(content)
        return digests.setdefault(f"{split} {digest}", row) if digest else row
    name = f"{split}/{path.name}"
    if name not in contents:
        return name
    if name not in digests:
        digests[name] = _digest(contents[name])
    digest = _digest(content)
    return name if digest in ("", digests[name]) else f"{split}/{path.stem}-{digest[:16]}{path.suffix}"


def _digest(content: Callable[[], bytes]) -> str:
    """SHA-256 of a picture; of what cannot be read, nothing."""
    try:
        return hashlib.sha256(content()).hexdigest()
    except OSError:
        return ""
