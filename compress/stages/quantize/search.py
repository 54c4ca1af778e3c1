"""A bounded search for an INT8 model within its CIDEr budget: its weights are tuned, then its worst parts go back to float one by one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from compress.artifact import Artifact, write_json, writing
from compress.context import Context
from compress.errors import StageError

TRIAL = "trial.json"


def search(
    make: Callable[[bool, Sequence[str], Path], None], tunes: bool, worst: Callable[[], Sequence[str]],
    parent: Artifact, context: Context,
) -> Path:
    """The folder of the best of at most `trials` + 1 artifacts (`candidates`); the first within `max_drop_cider` of `parent` ends it.

    `make(tuned, floating, folder)` writes an artifact; a StageError of it ends the search, unless it is the first's. What was tried is in
    `context.work`, the best of it whole: a search that was stopped goes on after its last trial."""
    config, log, label = context.stage.config, context.progress.log, context.stage.name
    tried: list[tuple[float, Path]] = []
    before = None
    for number, (tuned, floating) in enumerate(itertools.islice(candidates(tunes, worst), config.trials + 1)):
        folder = context.work / f"trial-{number}"
        if not folder.exists():
            before = context.ciders(parent) if before is None else before
            try:
                with writing(folder) as output:
                    make(tuned, floating, output)
                    write_json(output / TRIAL, {"delta_cider": float((context.ciders(Artifact(output)) - before).mean())})
            except StageError as error:
                if not tried:
                    raise
                log(f"{label}: {error.message}")
                break
        delta = json.loads((folder / TRIAL).read_text())["delta_cider"]
        tried.append((delta, folder))
        for _, other in sorted(tried, reverse=True)[1:]:
            for path in other.glob("*.onnx"):
                path.unlink()
        met = -delta <= config.max_drop_cider
        said = ", ".join([*(["tuned"] if tuned else []), f"in float: {', '.join(floating)}" if floating else "all in INT8"])
        log(f"{label}: trial {number} of {config.trials}, {said}: CIDEr {delta:+.2f}, max_drop_cider {config.max_drop_cider:g} "
            f"{'met' if met else 'not met'}")
        if met:
            break
    return max(tried)[1]


def candidates(tunes: bool, worst: Callable[[], Sequence[str]]) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """(whether its weights are tuned, the parts that stay in float): all in INT8, the same tuned if the stage tunes, then with one more of
    `worst()` in float in each."""
    yield False, ()
    if tunes:
        yield True, ()
    parts = tuple(worst())
    for count in range(1, len(parts) + 1):
        yield tunes, parts[:count]

