"""What `runs/.cache` holds: which artifacts are finished, what was written down of them, how fast stages ran."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.artifact import Artifact, read_json
from compress.errors import LightcapError, UsageError

FARTHEST = 30  # times the size; COCO has 19 times the images of Flickr8k


def cache_of(out: Path) -> Path:
    """The cache that a run's folder shares with its neighbours. UsageError where it has no name to lie beside, such as `.`."""
    if not Path(out).name:
        raise UsageError(f"--out {out}: name a folder")
    return Path(out).parent / ".cache"


def finished(folder: Path, measuring: str | None = None) -> bool:
    """Whether the artifact is whole, and, where `measuring` is given, whether its numbers were measured in that way."""
    if not ((folder / "metrics.json").is_file() and (folder / "lock.json").is_file()):
        return False
    return measuring is None or noted(folder).get("measured") == measuring


def noted(folder: Path) -> dict:
    """An artifact's lock.json. ModelError where it cannot be read."""
    return read_json(folder / "lock.json")


def last_made(out: Path, rows: Sequence[Mapping]) -> dict[str, dict]:
    """What the lock of each artifact that `rows` of a run's folder name is over, by name, where it is still there."""
    found = {}
    for row in rows:
        with contextlib.suppress(LightcapError, KeyError):
            found[row["name"]] = noted(out / row["artifact"])["parts"]
    return found


def durations(cache: Path) -> dict[str, list[tuple[float, float]]]:
    """(1e12 multiply-accumulates, seconds) of the finished artifacts of each kind of stage, the newest last."""
    found: dict[str, list[tuple[float, float]]] = {}
    for file in sorted(cache.glob("*/lock.json"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, LightcapError):
            known = noted(file.parent)
            tmacs, seconds = known["tmacs"], Artifact(file.parent).row()["seconds"]
            if tmacs > 0:
                found.setdefault(known["parts"]["kind"], []).append((tmacs, seconds))
    return found


def expected_seconds(known: Sequence[tuple[float, float]], tmacs: float) -> float | None:
    """How long a stage of `tmacs` may take: at the rate of that of `known` which is nearest in size, since small models keep no processor
    busy; of equally near ones the newest. None where none is known that is near enough for its rate to say something."""
    if not known or not tmacs:
        return None
    of, seconds = min(reversed(known), key=lambda pair: abs(math.log(pair[0] / tmacs)))
    return round(seconds / of * tmacs, 1) if 1 / FARTHEST < of / tmacs < FARTHEST else None
