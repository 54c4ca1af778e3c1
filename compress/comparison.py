"""Runs side by side: the rows that all share, those that nothing beats, and how rows of one name differ on the same images."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.cache import noted
from compress.errors import ModelError
from compress.ledger import captions, read_run

EVERY = "every run"


def compared(runs: Sequence[str]) -> dict:
    """The ledgers of several runs, the rows that nothing in any of them beats, and the `differences`: what `lightcap compare` says."""
    found = [{"run": name, "rows": rows, "images": images_of(Path(name), rows)} for name, rows in ((name, read_run(name)) for name in runs)]
    return {"runs": found, "pareto": unbeaten(found), "differences": differences(found)}


def unbeaten(runs: Sequence[Mapping]) -> list[dict]:
    """{"run", "stage", "name"} of the rows of `runs` ([{"run", "rows", "images"}]) that no other beats."""
    flat = [(entry["run"], row) for entry in runs for row in entry["rows"]]
    best = pareto([row for _, row in flat], [entry.get("images") for entry in runs for _ in entry["rows"]])
    return [{"run": flat[index][0], "stage": flat[index][1]["stage"], "name": flat[index][1]["name"]} for index in best]


def images_of(run: Path, rows: Sequence[Mapping]) -> str | None:
    """The digest of the images and references that a run was measured on; None where its artifacts are gone."""
    for row in rows:
        with contextlib.suppress(ModelError, KeyError, TypeError):
            known = noted(run / row["artifact"])["images"]  # of each split; an earlier lightcap noted one
            return known if isinstance(known, str) else known[row["split"]]
    return None


def drawn(value: Mapping) -> tuple[list[tuple[str, Mapping]], list[object], set[int]]:
    """Of what `compared` says, for people: the rows as (run, row), those of `side_by_side`; the images that each was measured on; and the
    places of those that nothing beats."""
    flat = [(run, row) for run, rows in side_by_side(value["runs"]) for row in rows]
    images_of_run = {entry["run"]: entry.get("images") for entry in value["runs"]}
    first = next(iter(images_of_run.values()), None)  # those of rows that all runs have
    images = [images_of_run.get(run, first) for run, _ in flat]
    best = {(entry["run"], entry["name"]) for entry in value["pareto"]}
    named = ((index, row["name"], images_of_run if run == EVERY else (run,)) for index, (run, row) in enumerate(flat))
    return flat, images, {index for index, name, runs in named if any((run, name) in best for run in runs)}


def pareto(rows: Sequence[Mapping], images: Sequence[object] | None = None) -> list[int]:
    """Indices of the rows that no other row beats or equals in CIDEr, bytes and median latency at once, and beats in one of them. Times of
    different runtimes are not compared: there CIDEr and bytes decide. Nor are rows of different splits, numbers of images,
    or `images`, which say for each row what it was measured on: a digest, or None, where rows alone are left to say it."""

    def point(values: Mapping, of: object) -> tuple[str | None, tuple[float, float, float], tuple] | None:
        latency = values.get("latency_ms") or {}
        numbers = (values.get("cider"), values.get("bytes"), latency.get("p50"))
        measured = values.get("split"), values.get("images"), of
        return None if None in numbers else (latency.get("runtime"), (-numbers[0], numbers[1], numbers[2]), measured)

    pairs = zip(rows, images or [None] * len(rows), strict=True)
    points = [None if values["stage"] == "baseline" else point(values, of) for values, of in pairs]

    def beats(other: tuple, mine: tuple) -> bool:
        count = 3 if other[0] == mine[0] else 2
        theirs, own = other[1][:count], mine[1][:count]
        return other[2] == mine[2] and theirs != own and all(a <= b for a, b in zip(theirs, own, strict=True))

    def beaten(mine: tuple) -> bool:
        return any(other is not None and beats(other, mine) for other in points)

    return [index for index, mine in enumerate(points) if mine is not None and not beaten(mine)]


def side_by_side(runs: Sequence[Mapping]) -> list[tuple[str, list[Mapping]]]:
    """The rows of `runs` ([{"run", "rows"}]) for people: those that are the same in all of several runs once, as EVERY, then each run's
    others."""
    if len(runs) == 1:
        return [(runs[0]["run"], runs[0]["rows"])]
    shared = [row for row in runs[0]["rows"] if all(row in entry["rows"] for entry in runs)] if runs else []
    groups = [(EVERY, shared), *((entry["run"], [row for row in entry["rows"] if row not in shared]) for entry in runs)]
    return [(name, rows) for name, rows in groups if rows]


def differences(runs: Sequence[Mapping]) -> list[dict]:
    """What each row of the later `runs` ([{"run", "rows"}]) has more than the first run's of that name: {"run", "name", "against" (that
    run), "delta_cider", "delta_ci95", "p_value"}, CIDEr-D x100 by a paired bootstrap over images. Left out are rows that are one artifact,
    and those not measured on the same images with the same references, or whose captions are no longer there."""
    from compress.metrics.bootstrap import paired  # numpy, which no other command that draws a table waits for

    found = []
    for entry in (entry for entry in runs[1:] if entry.get("images") == runs[0].get("images")):
        for row in entry["rows"]:
            first = next((other for other in runs[0]["rows"] if other["name"] == row["name"]), None)
            if first is None or first.get("lock") == row.get("lock") or first.get("split") != row.get("split"):
                continue
            mine, theirs = (ciders(run, values) for run, values in ((entry, row), (runs[0], first)))
            if mine and mine.keys() == theirs.keys():
                pair = paired(list(mine.values()), [theirs[image] for image in mine])
                found.append({"run": entry["run"], "name": row["name"], "against": runs[0]["run"], "delta_cider": pair.delta,
                              "delta_ci95": list(pair.ci95), "p_value": pair.p_value})
    return found


def ciders(run: Mapping, row: Mapping) -> dict[str, float]:
    """Image -> CIDEr-D x100 of what the row's artifact said of it; empty where that was not measured, is gone, or is of other images than
    the `run` ({"run", "images"}): another run that has the artifact, too, may have measured it on others since."""
    folder = Path(run["run"])
    if images_of(folder, [row]) != run.get("images"):
        return {}
    try:
        return {item["image"]: item["cider"] for item in captions(folder, row)}
    except ModelError:
        return {}


def cells(difference: Mapping) -> tuple[str, str, str]:
    """One of `differences` as a table shows it: its name, the difference with its interval, and p."""
    low, high = difference["delta_ci95"]
    return difference["name"], f"{difference['delta_cider']:+.2f} [{low:+.2f}, {high:+.2f}]", f"{difference['p_value']:.4f}"
