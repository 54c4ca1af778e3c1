"""What each stage of a run gains over the stage that its recipe compares it with, the seeds of a stage together, as Markdown.

    python benchmarks/gains.py runs/ablation [--json]

Stages that differ in their seed alone are one row. Its gain is the mean over seeds of the difference in CIDEr-D,
seed by seed; its 95 % interval is a bootstrap over images of each image's mean over seeds: it holds the variance of images, and of seeds no
more than what their mean leaves. `3 against 1` seeds: what they are compared with was trained once, and its luck is in all three gains,
which stand beside. `same` is the share of images of which both say the very same caption, `seeds alike` that of which two seeds do, mean
over pairs. With --json, one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import interval, number, table

from compress import ledger
from compress.config import Stage
from compress.errors import LightcapError
from compress.metrics.bootstrap import paired
from compress.recipe import read_recipe


def groups(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """{stage: itself and the stages that differ from it in their seed alone}, in the order of the recipe. Parents, and what rows are
    compared with, may differ in their seeds too."""
    found: dict[tuple, list[str]] = {}
    first: dict[str | None, str | None] = {None: None}  # of each stage's group
    for stage in stages:
        config = dataclasses.asdict(stage.config) | {"seed": None}
        names = found.setdefault((stage.kind, str(config), first[stage.parent], first[stage.against]), [])
        names.append(stage.name)
        first[stage.name] = names[0]
    return {names[0]: names for names in found.values()}


def captions(run: Path, row: Mapping) -> dict[str, tuple[str, float]]:
    """{image: its caption, and CIDEr-D x100}."""
    return {item["image"]: (item["caption"], item["cider"]) for item in ledger.captions(run, row)}


def same(pairs: Sequence[tuple[str, str]], spoken: Mapping[str, Mapping]) -> float | None:
    """The share of images of which both stages of a pair say the same caption, mean over `pairs`; None for no pair."""
    shares = [np.mean([spoken[a][image][0] == spoken[b][image][0] for image in spoken[a]]) for a, b in pairs]
    return float(np.mean(shares)) if shares else None


def gains(run: Path) -> list[dict]:
    """One row for each stage that has captions, seeds together: what it gains over the one that it is compared with, if any."""
    rows = {row["name"]: ledger.row(row) for row in ledger.read_run(run)}
    stages = read_recipe(run / "recipe.yaml").stages
    against = {stage.name: stage.against for stage in stages}
    spoken = {name: captions(run, row) for name, row in rows.items() if row["cider"] is not None and row["name"] != "nearest"}
    found = []
    for name, seeds in groups(stages).items():
        made = [seed for seed in seeds if seed in spoken]
        if not made:
            continue
        cider, seconds = ([rows[seed][key] or 0.0 for seed in made] for key in ("cider", "seconds"))
        row = {"name": name, "against": None, "seeds": len(made), "cider": float(np.mean(cider)), "seconds": sum(seconds)}
        row["seeds_alike"] = same(list(itertools.combinations(made, 2)), spoken)
        none = {"against_seeds": None, "gain": None, "gain_ci95": None, "gain_by_seed": [], "same": None}
        found.append(row | none | {key: rows[made[0]][key] for key in ("gmacs_caption", "params")})
        pairs = [(seed, against[seed]) for seed in made if against[seed] in spoken]
        if not pairs:
            continue
        images = sorted(spoken[made[0]])
        mine, theirs = (np.mean([[spoken[pair[side]][image][1] for image in images] for pair in pairs], 0) for side in (0, 1))
        whole = paired(mine, theirs)
        each = [float(np.mean([spoken[a][image][1] - spoken[b][image][1] for image in images])) for a, b in pairs]
        gain = {"gain": whole.delta, "gain_ci95": list(whole.ci95), "gain_by_seed": each, "same": same(pairs, spoken)}
        found[-1] |= gain | {"against": against[pairs[0][0]], "seeds": len(pairs), "against_seeds": len({theirs for _, theirs in pairs})}
    return found


COLUMNS = {
    "stage": lambda row: row["name"],
    "compared with": lambda row: row["against"] or "",
    "seeds": lambda row: str(row["seeds"]) + (f" against {row['against_seeds']}" if row["against"] else ""),
    "CIDEr": lambda row: number(row["cider"], ".1f"),
    "gain": lambda row: f"{number(row['gain'], '+.1f')} {interval(row['gain_ci95'], '+.1f')}".strip(),
    "of each seed": lambda row: ", ".join(format(gain, "+.1f") for gain in row["gain_by_seed"]),
    "same": lambda row: number(row["same"], ".0%"),
    "seeds alike": lambda row: number(row["seeds_alike"], ".0%"),
    "GMACs": lambda row: number(row["gmacs_caption"], ".3f"),
    "params": lambda row: number(row["params"], ".2f", 1e6) + ("M" if row["params"] else ""),
    "seconds": lambda row: number(row["seconds"], ".0f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        rows = gains(arguments.run)
    except LightcapError as error:
        parser.exit(2, f"gains.py: {error.message}\n")
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "rows": rows}))
    else:
        print(table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows], "---:"))


if __name__ == "__main__":
    main()
