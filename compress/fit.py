"""The least pruning that brings a recipe's last artifact under limits of size and time, and whether its CIDEr holds there.

Bytes (but for a few zero points) and milliseconds follow from shapes, not from what weights say: the share of MACs is found by bisection
over runs that leave out what changes weights alone from the pruning on, minutes each; then the recipe runs once in full.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import pipeline
from compress.artifact import remove_left
from compress.config import UNRECOVERED, Recipe, Stage, references
from compress.context import Progress
from compress.errors import GateError, TargetError, UsageError
from compress.parallel import refuse_several
from compress.recipe import read_recipe

LEAST, MOST, STEP = 0.2, 0.98, 0.02  # shares of the parent's MACs that are looked at
SHARED = 0.005  # megabytes that the end may differ by elsewhere: graphs share zero points that happen to be equal, of some bytes each
MARGIN = 0.97  # of a limit that is aimed at where the end differs: a time is taken again, later steps choose anew, parts go back to float


@dataclass(frozen=True)
class Limits:
    """Megabytes (10^6) on disk, milliseconds a caption as in the row's latency_ms, and CIDEr lost against what is pruned; None: any."""

    mb: float | None = None
    ms: float | None = None
    drop_cider: float | None = None

    def hold(self, mb: float, ms: float) -> bool:
        return (self.mb is None or mb <= self.mb) and (self.ms is None or ms <= self.ms)

    def aimed(self, recipe: Recipe) -> Limits:
        """Those that a model which is not recovered is held to."""
        exact = all(getattr(stage.config, "steps", 1) == 1 and not getattr(stage.config, "trials", 0) for stage in recipe.stages)
        return Limits(self.mb and (self.mb - SHARED if exact else self.mb * MARGIN), self.ms and self.ms * MARGIN)


def fit(name: str, sets: Sequence[str], limits: Limits, out: Path | None, progress: Progress) -> dict:
    """What `lightcap fit` says. UsageError for a recipe without exactly one `prune`; GateError where the limits cannot be held; what a run
    raises. Models that are not recovered stand in a run beside `out`, which is removed."""
    refuse_several("fit")
    if limits.mb is None and limits.ms is None:
        raise UsageError("give --max-mb, --max-ms or both")
    wanted = read_recipe(name, sets)
    stage = pruning(wanted)
    out = Path("runs") / f"{wanted.name}-fit" if out is None else out
    if not out.name:
        raise UsageError(f"--out {out}: name a folder")
    mark = f"{out.name}.unrecovered-"
    remove_left(out.parent, mark)
    beside = out.with_name(f"{mark}{os.getpid()}")  # its own, which no other `fit` removes
    aimed, tried = limits.aimed(wanted), []

    def holds(share: float) -> bool | None:
        bare, name = untrained(pruned_to(wanted, stage, share), stage)
        cut = [other.name for other in bare.stages].index(stage.name)
        result = pipeline.run(bare, beside, progress, gates=False, sizes_only=[other.name for other in bare.stages[cut:]])
        if isinstance(result.error, TargetError):
            return None
        last = next(row for row in result.check().rows if row["name"] == name)
        found = {"macs": share, "mb": last["bytes"] / 1e6, "ms": last["latency_ms"]["p50"]}
        held = aimed.hold(found["mb"], found["ms"])
        tried.append(found | {"held": held})
        where = "within" if held else "beyond"
        progress.log(f"fit: {share:.2f} of MACs is {found['mb']:.2f} MB and {found['ms']:.1f} ms, {where} the limits")
        return held

    try:
        share = largest(holds)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # the artifacts stay in the cache
    if not tried:
        raise GateError(f"nothing that '{stage.name}' may remove comes to {MOST:g} of MACs; allow it more parts")
    if share is None:
        last = min(tried, key=lambda item: item["macs"])
        raise GateError(f"the limits cannot be held: {last['macs']:g} of MACs is still {last['mb']:.2f} MB and {last['ms']:.1f} ms")
    rows = pipeline.run(pruned_to(wanted, stage, share), out, progress, gates=False).check().rows
    mb, ms = rows[-1]["bytes"] / 1e6, rows[-1]["latency_ms"]["p50"]
    drop = next(row["cider"] for row in rows if row["name"] == stage.parent) - rows[-1]["cider"]
    met = limits.hold(mb, ms) and (limits.drop_cider is None or drop <= limits.drop_cider)
    return {"ok": met, "run": str(out), "macs": share, "mb": mb, "ms": ms, "drop_cider": drop, "against": stage.parent, "tried": tried,
            "ledger": list(rows)}


def pruning(recipe: Recipe) -> Stage:
    """The recipe's one `prune`. UsageError where it has none or several, or where it works on a concept extractor, which says nothing."""
    found = [stage for stage in recipe.stages if stage.kind == "prune"]
    if len(found) != 1:
        raise UsageError(f"fit needs a recipe with one 'prune' stage; {recipe.name} has {len(found)}")
    stages = {stage.name: stage for stage in recipe.stages}
    if stages[found[0].parent].kind == "concepts":
        raise UsageError(f"fit judges captions, and '{found[0].parent}', which '{found[0].name}' works on, has none yet; prune a captioner")
    last, behind = recipe.stages[-1], {found[0].name}
    for stage in recipe.stages:  # each names earlier ones alone
        if behind & {stage.parent, *references(stage.config)}:
            behind.add(stage.name)
    if last.name not in behind:
        raise UsageError(f"fit judges the last stage, and '{last.name}' is not made of '{found[0].name}'; end with one that is")
    if last.kind == "concepts":
        raise UsageError(f"fit judges the last stage's captions, and '{last.name}' has none yet; end with a captioner")
    return found[0]


def pruned_to(recipe: Recipe, stage: Stage, share: float) -> Recipe:
    """`recipe` with its `prune` at `share` of its parent's MACs, every step of it, whatever CIDEr that costs: it is judged at the end."""
    config = dataclasses.replace(stage.config, macs=share, params=None, mb=None, ms=None, max_drop_cider=None)
    stages = (dataclasses.replace(other, config=config) if other.name == stage.name else other for other in recipe.stages)
    return dataclasses.replace(recipe, stages=tuple(stages))


def untrained(recipe: Recipe, stage: Stage) -> tuple[Recipe, str]:
    """`recipe` without what trains or tries weights alone from its `prune` on, and its stage that has the shapes of the last one. A stage
    that makes another shape stays, with those that it names."""
    first = [other.name for other in recipe.stages].index(stage.name)
    named, left_out = set(), {}  # by stages that stay; {name: parent}
    for other in reversed(recipe.stages[first + 1 :]):
        if same_shapes(other) and other.name not in named:
            left_out[other.name] = other.parent
        else:
            named.update(references(other.config), {other.parent} if same_shapes(other) else ())

    def stands(name: str | None) -> str | None:
        return stands(left_out[name]) if name in left_out else name

    off = {
        "prune": UNRECOVERED,
        "quantize": {"trials": 0, "tune_epochs": 0.0, "sensitivity": False},
    }
    stages = list(recipe.stages[:first])
    for other in recipe.stages[first:]:
        if other.name not in left_out:
            config = dataclasses.replace(other.config, **off.get(other.kind, {}))
            stages.append(dataclasses.replace(other, config=config, parent=stands(other.parent), against=stands(other.against)))
    return dataclasses.replace(recipe, stages=tuple(stages)), stands(recipe.stages[-1].name)


def same_shapes(stage: Stage) -> bool:
    """Whether a stage changes weights alone of the artifact that it works on."""
    if stage.kind == "distill" and stage.config.heads is not None:
        return False
    return stage.parent is not None and stage.kind in ("train", "distill", "scst", "average")


def largest(holds: Callable[[float], bool | None]) -> float | None:
    """The largest share, to a STEP, for which `holds`, by bisection; None where it does for none. `holds` says None of a share that nothing
    reaches: those are the least ones."""
    held = holds(MOST)
    if held is not False:
        return MOST if held else None
    low, high, best = -1, round((MOST - LEAST) / STEP), None
    while high - low > 1:
        middle = (low + high) // 2
        held = holds(at(middle))
        if held is False:
            high = middle
        else:
            low, best = middle, middle if held else best
    return None if best is None else at(best)


def at(step: int) -> float:
    return round(LEAST + step * STEP, 2)
