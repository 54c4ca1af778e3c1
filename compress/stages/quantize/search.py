"""A bounded search for an INT8 model within its CIDEr budget: its weights are tuned, then its worst parts go back to float one by one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from compress.artifact import GRAPH_PATTERNS, Artifact, write_json, writing
from compress.context import Context
from compress.errors import StageError

TRIAL = "trial.json"


def search(
    make: Callable[[bool, Sequence[str], Path], None], tunes: bool, worst: Callable[[bool], Sequence[str]],
    parent: Artifact, context: Context,
) -> tuple[Path, bool]:
    """The folder of the best of at most `trials` + 1 artifacts, and whether it is within `max_drop_cider` of what the stage is compared
    with: all in INT8; the same with tuned weights, if the stage `tunes`; then the better of these with one more of the parts
    `worst(tuned)` in float in each. The first that is within ends it.

    `make(tuned, floating, folder)` writes an artifact; what raises StageError there is left out, unless it is the first. What was tried is
    in `context.work`, the best of it whole: a search that was stopped goes on after its last trial."""
    config, log, label = context.stage.config, context.progress.log, context.stage.name
    against = context.artifacts.get(context.stage.against, parent)
    tried: list[tuple[float, Path]] = []
    tuned, floating = False, ()  # of the last that could be made, but of tuned weights that lose more
    candidate: tuple[bool, tuple[str, ...]] = (tuned, floating)
    queue: list[str] | None = None
    before = None
    for number in range(config.trials + 1):
        folder = context.work / f"trial-{number}"
        if not folder.exists():
            before = context.ciders(against) if before is None else before
            with writing(folder) as output:
                found: dict = {"tuned": candidate[0], "floating": candidate[1]}
                try:
                    make(*candidate, output)
                    found["delta_cider"] = float((context.ciders(Artifact(output)) - before).mean())
                except StageError as error:
                    if not tried:
                        raise
                    found["error"] = error.message
                    drop_graphs(output)
                write_json(output / TRIAL, found)
        found = json.loads((folder / TRIAL).read_text())
        said = ", ".join([*(["tuned"] if candidate[0] else []), f"in float: {', '.join(candidate[1])}" if candidate[1] else "all in INT8"])
        if "error" in found:
            log(f"{label}: trial {number} of {config.trials}, {said}: {found['error']}")
        else:
            if candidate != (True, ()) or found["delta_cider"] >= tried[0][0]:
                tuned, floating = candidate
            tried.append((found["delta_cider"], folder))
            for _, other in sorted(tried, key=itemgetter(0), reverse=True)[1:]:  # of equal ones the first stays: fewer parts in float
                drop_graphs(other)
            met = -found["delta_cider"] <= config.max_drop_cider
            log(f"{label}: trial {number} of {config.trials}, {said}: CIDEr {found['delta_cider']:+.2f}, max_drop_cider "
                f"{config.max_drop_cider:g} {'met' if met else 'not met'}")
            if met:
                break
        if tunes and number == 0:
            candidate = (True, ())
            continue
        if queue is None and number < config.trials:
            queue = list(worst(tuned))
        if not queue:
            break
        candidate = (tuned, (*floating, queue.pop(0)))
    delta, best = max(tried, key=itemgetter(0))
    return best, -delta <= config.max_drop_cider


def drop_graphs(folder: Path) -> None:
    for path in itertools.chain.from_iterable(folder.glob(pattern) for pattern in GRAPH_PATTERNS):
        path.unlink()
