"""One recipe with several values of some of its keys: a run for every combination, which share in the cache what the keys do not touch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from compress import comparison, pipeline
from compress.config import Recipe
from compress.context import Progress
from compress.errors import UsageError
from compress.parallel import refuse_several
from compress.recipe import read_recipe

COMMA = re.compile(r",(?![^\[]*\])")  # one that stands in no list


def combinations(vary: Sequence[str]) -> list[tuple[str, ...]]:
    """`NAME.key=a,b,c` of each key -> the settings `NAME.key=a` of each combination, the last key's values first. UsageError for a key
    without two values, or named twice."""
    options = []
    for text in vary:
        key, mark, values = text.partition("=")
        key = key.strip()
        found = [value.strip() for value in COMMA.split(values)]
        if not mark or not key or len(found) < 2 or not all(found) or len(set(found)) < len(found):
            raise UsageError(f"--vary {text}: write NAME.key=a,b with two different values or more")
        if any(other[0].startswith(f"{key}=") for other in options):
            raise UsageError(f"--vary {text}: '{key}' varies already")
        options.append([f"{key}={value}" for value in found])
    return list(itertools.product(*options))


def run(wanted: Sequence[tuple[Path, tuple[str, ...], Recipe]], progress: Progress) -> dict:
    """Runs each of `wanted`, one after the other, and compares them: what `lightcap sweep` says. One that fails stops no other; input that
    the first cannot use does, before anything is made."""
    refuse_several("sweep")
    done, failed = [], []
    for number, (folder, chosen, recipe) in enumerate(wanted, start=1):
        progress.log(f"run {number} of {len(wanted)}: {' '.join(chosen)}")
        result = pipeline.run(recipe, folder, progress)
        if isinstance(result.error, UsageError) and number == 1 and not result.rows:
            raise result.error
        if result.rows:
            done.append(str(folder))
        if result.error is not None:
            result.error.show()
            failed.append({"run": str(folder), "error": result.error.message})
    return comparison.compared(done) | {"ok": not failed, "failed": failed}


def recipes(name: str, sets: Sequence[str], vary: Sequence[str], out: Path | None) -> list[tuple[Path, tuple[str, ...], Recipe]]:
    """(the run's folder, its settings, its recipe) of every combination, all read before one is run. The folder is `out` (runs/NAME) with
    the settings behind it: runs/photos-pruned.macs-0.5."""
    found = []
    for chosen in combinations(vary):
        wanted = read_recipe(name, (*sets, *chosen))
        base = Path("runs") / wanted.name if out is None else out
        if not base.name:
            raise UsageError(f"--out {base}: name a folder; each run's settings are put behind its name")
        label = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", setting).strip("-") for setting in chosen)
        folder = base.with_name(f"{base.name}-{label}")
        if any(other[0] == folder for other in found):
            raise UsageError(f"--vary: two of the runs would be {folder}; run them one by one with --out")
        found.append((folder, chosen, wanted))
    return found
