"""The least pruning that brings a recipe's last artifact under limits of size and time, and whether its CIDEr holds there.

Bytes and milliseconds follow from shapes, not from what weights say: the share of MACs is found by bisection over runs whose pruned models
are not recovered, minutes each; then the recipe runs once in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import pipeline
from compress.config import Recipe, Stage
from compress.context import Progress
from compress.errors import GateError, UsageError
from compress.recipe import read_recipe

LEAST, MOST, STEP = 0.2, 0.98, 0.02  # shares of the parent's MACs that are looked at
MARGIN = 0.97  # of a limit in milliseconds that is aimed at: the time is taken again at the end


@dataclass(frozen=True)
class Limits:
    """Megabytes (10^6) on disk, milliseconds a caption as in the row's latency_ms, and CIDEr lost against what is pruned; None: any."""

    mb: float | None = None
    ms: float | None = None
    drop_cider: float | None = None

    def hold(self, mb: float, ms: float, share: float = 1.0) -> bool:
        return (self.mb is None or mb <= self.mb) and (self.ms is None or ms <= self.ms * share)


def fit(name: str, sets: Sequence[str], limits: Limits, out: Path | None, progress: Progress) -> dict:
    """What `lightcap fit` says. UsageError for a recipe without exactly one `prune`; GateError where the limits cannot be held, or CIDEr is
    lost; what a run raises."""
    if limits.mb is None and limits.ms is None:
        raise UsageError("give --max-mb, --max-ms or both")
    wanted = read_recipe(name, sets)
    stage = pruning(wanted)
    out = Path("runs") / f"{wanted.name}-fit" if out is None else out
    tried: list[dict] = []

    def attempt(share: float, recovered: bool) -> dict:
        rows = pipeline.run(pruned_to(wanted, stage, share, recovered), out, progress).check().rows
        return {"macs": share, "mb": rows[-1]["bytes"] / 1e6, "ms": rows[-1]["latency_ms"]["p50"], "rows": rows}

    def holds(share: float) -> bool:
        found = attempt(share, recovered=False)
        held = limits.hold(found["mb"], found["ms"], MARGIN)
        tried.append({"macs": share, "mb": found["mb"], "ms": found["ms"], "held": held})
        where = "within" if held else "beyond"
        progress.log(f"fit: {share:.2f} of MACs is {found['mb']:.2f} MB and {found['ms']:.1f} ms, {where} the limits")
        return held

    share = largest(holds)
    if share is None:
        last = min(tried, key=lambda item: item["macs"])
        raise GateError(f"the limits cannot be held: {last['macs']:g} of MACs is still {last['mb']:.2f} MB and {last['ms']:.1f} ms")
    final = attempt(share, recovered=True)
    by_name = {row["name"]: row for row in final["rows"]}
    drop = by_name[stage.parent]["cider"] - final["rows"][-1]["cider"]
    met = limits.hold(final["mb"], final["ms"]) and (limits.drop_cider is None or drop <= limits.drop_cider)
    return {"ok": met, "run": str(out), "macs": share, "mb": final["mb"], "ms": final["ms"], "drop_cider": drop, "against": stage.parent,
            "tried": tried, "ledger": list(final["rows"])}


def pruning(recipe: Recipe) -> Stage:
    found = [stage for stage in recipe.stages if stage.kind == "prune"]
    if len(found) != 1:
        raise UsageError(f"fit needs a recipe with one 'prune' stage; {recipe.name} has {len(found)}")
    return found[0]


def pruned_to(recipe: Recipe, stage: Stage, share: float, recovered: bool) -> Recipe:
    """`recipe` with its `prune` at `share` of its parent's MACs, and no gates: CIDEr is judged at the end."""
    changes = {"macs": share, "params": None, "mb": None, "ms": None, "max_drop_cider": None}
    if not recovered:
        changes |= {"recover_epochs": 0.0, "recover_encoder_epochs": 0.0, "steps": 1}

    def changed(other: Stage) -> Stage:
        if other.name == stage.name:
            return dataclasses.replace(other, config=dataclasses.replace(other.config, **changes))
        if other.kind == "quantize":
            return dataclasses.replace(other, config=dataclasses.replace(other.config, max_drop_cider=None, trials=0))
        return other

    return dataclasses.replace(recipe, stages=tuple(changed(other) for other in recipe.stages))


def largest(holds: Callable[[float], bool]) -> float | None:
    """The largest share, to a STEP, for which `holds`, by bisection; None where not even the least does."""
    if holds(MOST):
        return MOST
    if not holds(LEAST):
        return None
    low, high = 0, round((MOST - LEAST) / STEP)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(round(LEAST + middle * STEP, 2)):
            low = middle
        else:
            high = middle
    return round(LEAST + low * STEP, 2)
