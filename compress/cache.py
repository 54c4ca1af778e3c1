"""What `runs/.cache` holds: which artifacts are finished, what was written down of them, how fast stages ran."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from compress.artifact import Artifact
from compress.errors import LightcapError


def cache_of(out: Path) -> Path:
    """The cache that a run's folder shares with its neighbours."""
    return Path(out).parent / ".cache"


def finished(folder: Path, measuring: str | None = None) -> bool:
    """Whether the artifact is whole, and, where `measuring` is given, whether its numbers were measured in that way."""
    if not ((folder / "metrics.json").is_file() and (folder / "lock.json").is_file()):
        return False
    return measuring is None or noted(folder).get("measured") == measuring


def noted(folder: Path) -> dict:
    """An artifact's lock.json."""
    return json.loads((folder / "lock.json").read_text(encoding="utf-8"))


def rates_of(cache: Path) -> dict[str, float]:
    """Seconds per 1e12 multiply-accumulates of each kind of stage, from the newest finished artifact of that kind."""
    rates = {}
    for file in sorted(cache.glob("*/lock.json"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError, LightcapError):
            found = noted(file.parent)
            rates[found["parts"]["kind"]] = Artifact(file.parent).row()["seconds"] / found["tmacs"]
    return rates
