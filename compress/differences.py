"""Rows of one name in several runs, such as a sweep's: how far CIDEr differs on the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.ledger import captions_file
from compress.metrics.bootstrap import paired


def differences(runs: Sequence[Mapping]) -> list[dict]:
    """What each row of the later `runs` ([{"run", "rows"}]) has more than the first run's of that name: {"run", "name", "against" (that
    run), "delta_cider", "delta_ci95", "p_value"}, CIDEr-D x100 by a paired bootstrap over images. Left out are rows that are one artifact,
    and those not measured on the same images, or whose captions are no longer there."""
    found = []
    for entry in runs[1:]:
        for row in entry["rows"]:
            first = next((other for other in runs[0]["rows"] if other["name"] == row["name"]), None)
            if first is None or first.get("lock") == row.get("lock") or first.get("split") != row.get("split"):
                continue
            mine, theirs = (ciders(Path(run["run"]), values) for run, values in ((entry, row), (runs[0], first)))
            if mine and mine.keys() == theirs.keys():
                pair = paired(np.array(list(mine.values())), np.array([theirs[image] for image in mine]))
                found.append({"run": entry["run"], "name": row["name"], "against": runs[0]["run"], "delta_cider": pair.delta,
                              "delta_ci95": list(pair.ci95), "p_value": pair.p_value})
    return found


def ciders(run: Path, row: Mapping) -> dict[str, float]:
    """Image -> CIDEr-D x100 of what the row's artifact said of it; empty where that was not measured, or is gone."""
    path = captions_file(run / row["artifact"], row.get("split") or "")
    return {item["image"]: item["cider"] for item in json.loads(path.read_text())} if path.is_file() else {}
