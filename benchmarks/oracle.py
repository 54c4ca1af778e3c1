"""What the concepts before a caption are worth: one captioner's CIDEr with those that it finds, and with others in their place.

    python benchmarks/oracle.py runs/ablation NAME [--json]

NAME is a row of the run whose model reads concepts. Its word pieces of concepts are replaced, nothing else, and val is captioned again with
a beam of 5: by those of another image; by those of its own that a reference mentions, and no false one, again and again until there are as
many as it was trained with (`precise`; where there are none its own stay); and by all that a reference mentions, then its own best ones
(`oracle`), the most that any extractor over this list of concepts could give. Differences are to the model's own, on the same images, with
paired bootstrap intervals. Markdown, or with --json one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import interval, number, table

from compress import data, ledger, metrics, recipe
from compress.artifact import Artifact
from compress.cache import cache_of
from compress.config import vocabulary_of
from compress.context import Progress, Task
from compress.data import CaptionSet
from compress.data.concepts import read_concepts
from compress.decode import Special, beam_search
from compress.errors import LightcapError, ModelError
from compress.evaluate import narrowed
from compress.metrics.bootstrap import paired
from compress.process import thread_count
from compress.training.features import grids
from compress.training.mentions import best_concepts, mentioned
from compress.training.start import read_captioner
from students.lightcap import LightCap
from students.lightcap.concepts import NONE
from students.lightcap.tokenizer import decode_caption

BATCH, BEAM = 50, 5


def repeated(wanted: Tensor, scores: Tensor, pieces: Tensor, found: Tensor) -> Tensor:
    """wanted (N, count) bool, scores (N, count), word pieces (count, longest), `found` (N, most) ids -> (N, most) ids: the wanted concepts'
    pieces, the best scored first, and again from the first until the row is full; a row of `found` where nothing is wanted."""
    rows = found.clone()
    for row, order in enumerate(scores.argsort(1, descending=True)):
        ids = [piece for concept in order[wanted[row, order]] for piece in pieces[concept].tolist() if piece != NONE]
        if ids:
            rows[row] = torch.tensor(ids).repeat(-(-found.shape[1] // len(ids)))[: found.shape[1]]
    return rows


def row_of(run: Path, rows: Mapping[str, Mapping], name: str) -> tuple[LightCap, Tokenizer, dict]:
    """The captioner of a row of `run`, its tokenizer and its preprocessing. ModelError where there is none, or it reads no concepts."""
    if name not in rows:
        raise ModelError(f"{run}: no finished row '{name}'; there are {', '.join(rows)}")
    model, tokenizer, settings = read_captioner(Artifact(run / rows[name]["artifact"]).path)
    if not model.config.concepts:
        raise ModelError(f"{run}: the model of '{name}' reads no concepts")
    return model, tokenizer, settings


@torch.inference_mode()
def ciders(
    model: LightCap, tokenizer: Tokenizer, spoken: Tensor, special: Special, features: np.ndarray, given: Tensor, val: CaptionSet,
    task: Task,
) -> np.ndarray:
    """CIDEr-D of every image of `features` (N, G, channels), with its row of `given` (N, K) for its concepts; `spoken`, `special`: what
    `narrowed` said of `model`, which finds no concepts of its own from then on."""
    rows: Iterator[Tensor] = iter(given.split(BATCH))
    model.find_concepts = lambda grid: next(rows)
    said = []
    for start in range(0, len(features), BATCH):
        grid = torch.from_numpy(np.array(features[start : start + BATCH])).float()
        said += [list(found.tokens) for found in beam_search(model, grid, special, BEAM, model.config.max_tokens)]
        task.advance(len(grid))
    texts = [decode_caption(tokenizer, spoken[ids].tolist()) for ids in said]
    return metrics.score(texts, [list(example.captions) for example in val.examples]).per_image


def compare(run: Path, name: str) -> list[dict]:
    """A row for each kind of concepts: their precision and recall over all images, CIDEr, and the difference to the model's own."""
    rows, wanted = {row["name"]: row for row in ledger.read_run(run)}, recipe.read_recipe(run / "recipe.yaml")
    model, tokenizer, settings = row_of(run, rows, name)
    progress, cache = Progress(), cache_of(run)
    val = data.load(wanted.data, cache).split(wanted.data.val_split)
    features = grids(model, val, settings, cache, progress)
    vocabulary = vocabulary_of(wanted, next(stage for stage in wanted.stages if stage.name == name))
    spoken, special = narrowed(model, tokenizer)
    true, pieces, most = mentioned(val, read_concepts(vocabulary)), model.concepts.pieces, model.config.concepts
    with torch.inference_mode():
        scores = torch.cat([model.concept_scores(torch.from_numpy(np.array(features[start : start + BATCH])).float())
                            for start in range(0, len(features), BATCH)])
        found = model.concepts.choose(scores, most)
    own = best_concepts(scores, pieces, most)
    precise = own & true
    first = scores + (scores.max() - scores.min() + 1) * true
    kinds = {"found": (found, own), "of another image": (found.roll(1, 0), own.roll(1, 0)),
             "precise": (repeated(precise, scores, pieces, found), torch.where(precise.any(1, keepdim=True), precise, own)),
             "oracle": (model.concepts.choose(first, most), best_concepts(first, pieces, most))}
    answers: list[dict] = []
    for kind, (given, shown) in kinds.items():
        with progress.task(kind, len(val)) as task:
            each = ciders(model, tokenizer, spoken, special, features, given, val, task)
        gain = paired(each, answers[0]["each"]) if answers else None
        hits = int((shown & true).sum())
        answers.append({
            "concepts": kind, "precision": hits / max(int(shown.sum()), 1), "recall": hits / max(int(true.sum()), 1),
            "cider": float(np.mean(each)), "each": each,
            "delta": gain.delta if gain else None, "delta_ci95": list(gain.ci95) if gain else None,
        })
    return [{key: value for key, value in answer.items() if key != "each"} for answer in answers]


COLUMNS = {
    "concepts": lambda row: row["concepts"],
    "precision": lambda row: number(row["precision"], ".2f"),
    "recall": lambda row: number(row["recall"], ".2f"),
    "CIDEr": lambda row: number(row["cider"], ".1f"),
    "difference": lambda row: f"{number(row['delta'], '+.1f')} {interval(row['delta_ci95'], '+.1f')}".strip(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("name", help="a row of it whose model reads concepts")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    try:
        rows = compare(arguments.run, arguments.name)
    except LightcapError as error:
        parser.exit(2, f"oracle.py: {error.message}\n")
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "name": arguments.name, "rows": rows}))
    else:
        print(table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows], "---:"))


if __name__ == "__main__":
    main()
