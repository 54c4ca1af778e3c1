"""Which part of a smaller captioner costs CIDEr: a row, with encoder, concept extractor and fusion taken from another row, in all ways.

    python benchmarks/parts.py runs/photos vocabulary pruned [--json]

Both rows are of captioners in PyTorch over the same word pieces, such as a stage `prune` and its parent. The encoder's grid is read by
extractor and fusion, whosever they are; nothing is trained, so parts that learned beside one another are worth a little more together.
Captions of val with a beam of 5; differences are to the first row's own, on the same images, with paired bootstrap intervals. Markdown, or
with --json one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle import BATCH, ciders, row_of
from results import interval, number, table

from compress import data, ledger, recipe
from compress.cache import cache_of
from compress.context import Progress
from compress.errors import LightcapError, ModelError
from compress.evaluate import narrowed
from compress.metrics.bootstrap import paired
from compress.process import thread_count
from compress.training.features import grids

PARTS = ("encoder", "concepts", "fusion")


def compare(run: Path, names: tuple[str, str]) -> list[dict]:
    """A row for each choice of parts: those taken from the second row, CIDEr, and the difference to the first row's own."""
    rows, wanted = {row["name"]: row for row in ledger.read_run(run)}, recipe.read_recipe(run / "recipe.yaml")
    models, tokenizers, settings = zip(*(row_of(run, rows, name) for name in names), strict=True)
    if tokenizers[0].to_str() != tokenizers[1].to_str() or settings[0] != settings[1]:
        raise ModelError(f"{run}: '{names[0]}' and '{names[1]}' have other word pieces or pictures of another kind; no part fits the other")
    progress, cache = Progress(), cache_of(run)
    val = data.load(wanted.data, cache).split(wanted.data.val_split)
    features = [grids(model, val, settings[0], cache, progress) for model in models]
    (spoken, special), _ = (narrowed(model, tokenizers[0]) for model in models)
    finders = [model.find_concepts for model in models]
    answers: list[dict] = []
    for taken in itertools.chain.from_iterable(itertools.combinations(PARTS, count) for count in range(len(PARTS) + 1)):
        grid, find, fusion = (of[part in taken] for part, of in zip(PARTS, (features, finders, models), strict=True))
        with torch.inference_mode():
            found = [find(torch.from_numpy(np.array(grid[start : start + BATCH])).float()) for start in range(0, len(grid), BATCH)]
        with progress.task(" and ".join(taken) or names[0], len(val)) as task:
            each = ciders(fusion, tokenizers[0], spoken, special, grid, torch.cat(found), val, task)
        gain = paired(each, answers[0]["each"]) if answers else None
        answers.append({"taken": list(taken), "cider": float(np.mean(each)), "each": each, "delta": gain.delta if gain else None,
                        "delta_ci95": list(gain.ci95) if gain else None})
    return [{key: value for key, value in answer.items() if key != "each"} for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("whole", help="a row of it")
    parser.add_argument("smaller", help="the row whose parts are put in its place")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    try:
        rows = compare(arguments.run, (arguments.whole, arguments.smaller))
    except LightcapError as error:
        parser.exit(2, f"parts.py: {error.message}\n")
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "whole": arguments.whole, "smaller": arguments.smaller, "rows": rows}))
    else:
        print(table([f"of {arguments.smaller}", "CIDEr", "difference"],
                    [[", ".join(row["taken"]) or "nothing", number(row["cider"], ".1f"),
                      f"{number(row['delta'], '+.1f')} {interval(row['delta_ci95'], '+.1f')}".strip()] for row in rows], "---:"))


if __name__ == "__main__":
    main()
