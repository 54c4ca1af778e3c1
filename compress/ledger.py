"""The ledger: one row per stage in `ledger.jsonl` of a run's folder. Tables, JSON and the report show these rows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from compress.artifact import read_json, write_text
from compress.config import Stage
from compress.errors import ModelError

# The keys of a row, in order. CIDEr is CIDEr-D as in coco-caption, x100, as are BLEU-4 and ROUGE-L.
ROW = (
    "stage",  # its key in the recipe
    "name",  # its label
    "artifact",  # path relative to the run's folder
    "split",
    "params",
    "params_by_part",
    "gmacs_encoder",
    "gmacs_caption",
    "gflops_caption",
    "gbops_caption",
    "bytes",
    "latency_ms",  # {p50, p90, threads, beam, runtime}
    "parent_latency_ms",  # the same of the artifact it worked on, measured in turn with it, in the same runtime
    "cider",
    "cider_ci95",
    "bleu4",
    "rouge_l",
    "concept_precision",  # of a concept extractor: the share of the concepts it found that the image's captions mention
    "concept_recall",  # and of those that they mention, the share that it found
    "images",
    "against",  # the stage that it is compared with: the one it worked on; of a student, its teacher; or what `against:` names
    "delta_cider",  # CIDEr less that of the same images there
    "delta_ci95",  # the 95 % interval of that difference, by paired bootstrap over images
    "p_value",
    "peak_mb",  # 10^6 bytes, the most in memory while it was made and measured (by the process that ended it, if there were several)
    "seconds",
    "lock",
)


def row(values: Mapping) -> dict:
    """The values in the ledger's order; what was not measured is None. ValueError for a key that no row has."""
    unknown = set(values) - set(ROW)
    if unknown:
        raise ValueError(f"not keys of a ledger row: {', '.join(sorted(unknown))}")
    return {key: values.get(key) for key in ROW}


def captions_file(artifact: Path, split: str) -> Path:
    """Beside an artifact's metrics.json: what it said of each image of `split`, and that caption's CIDEr-D x100. Another split has another
    file, since rows of other runs may name the same artifact."""
    return artifact / f"captions.{re.sub('[^A-Za-z0-9_.-]', '_', split)}.json"


def captions(run: Path, row: Mapping) -> list[dict]:
    """{"image", "caption", "cider"} of each image that the row was measured on; ModelError where its artifact is no longer there."""
    path = captions_file(run / row["artifact"], row.get("split") or "")
    if not path.exists():
        raise ModelError(f"{run}: what '{row['name']}' said is gone ({path} is not there); the same run makes it anew")
    return read_json(path, list)


def against(stage: Stage, measured: Mapping) -> str | None:
    """The stage that `measured` was compared with, as this recipe calls it."""
    return stage.against if measured.get("delta_cider") is not None else None


def read(path: Path) -> list[dict]:
    """The rows of a ledger.jsonl. ModelError, with the line, for what is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            raise ModelError(f"{path}:{number}: is not a JSON row") from None
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("stage", "name", "artifact")):
            raise ModelError(f"{path}:{number}: is not a ledger row")
        rows.append(value)
    return rows


def write(path: Path, rows: Iterable[Mapping]) -> None:
    """Replaces the ledger in one step."""
    write_text(path, "".join(json.dumps(row(values), ensure_ascii=False) + "\n" for values in rows))


def read_run(folder: str | Path) -> list[dict]:
    """The rows of a run's folder; ModelError if it is none."""
    path = Path(folder) / "ledger.jsonl"
    if not os.path.isfile(path):  # unlike Path's, false where its folder may not be read
        what = "has no ledger.jsonl" if os.path.isdir(folder) else "is not a folder"
        raise ModelError(f"{folder} is not a run: it {what}; `lightcap run RECIPE` makes one")
    return read(path)
