"""What the concepts before a caption are worth: one captioner's CIDEr with those that it finds, and with others in their place.

    python benchmarks/oracle.py runs/ablation NAME [--json]

NAME is a row of the run whose model reads concepts. Its word pieces of concepts are replaced, nothing else, and val is captioned again with
a beam of 5: by none at all; by those of another image; by those of its own that a reference mentions, and no false one (`precise`); and by
all that a reference mentions (`oracle`), the most that any extractor over this list of concepts could give. Differences are to the model's
own, on the same images, with paired bootstrap intervals. Markdown, or with --json one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import interval, number, table  # noqa: E402

from compress import data, ledger, metrics, recipe  # noqa: E402
from compress.artifact import Artifact  # noqa: E402
from compress.cache import cache_of  # noqa: E402
from compress.context import Progress, Task  # noqa: E402
from compress.data.concepts import read_concepts  # noqa: E402
from compress.decode import Special, beam_search  # noqa: E402
from compress.errors import LightcapError, ModelError  # noqa: E402
from compress.evaluate import narrowed  # noqa: E402
from compress.metrics.bootstrap import paired  # noqa: E402
from compress.process import thread_count  # noqa: E402
from compress.training.features import grids  # noqa: E402
from compress.training.mentions import best_concepts, mentioned  # noqa: E402
from compress.training.start import read_captioner  # noqa: E402
from students.lightcap import LightCap  # noqa: E402
from students.lightcap.concepts import NONE  # noqa: E402
from students.lightcap.tokenizer import decode_caption  # noqa: E402

BATCH, BEAM = 50, 5


def spelled(wanted: Tensor, scores: Tensor, pieces: Tensor, most: int) -> Tensor:
    """wanted (N, count) bool, scores (N, count), word pieces (count, longest) -> (N, most) ids: the wanted concepts' pieces, the best
    scored first, cut at `most` and padded with 0, as the model writes those that it finds."""
    rows = torch.zeros(len(wanted), most, dtype=torch.int64)
    for row, order in enumerate(scores.argsort(1, descending=True)):
        ids = [piece for concept in order[wanted[row, order]] for piece in pieces[concept].tolist() if piece != NONE][:most]
        rows[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return rows


@torch.inference_mode()
def captions(model: LightCap, special: Special, features: np.ndarray, given: Tensor, task: Task) -> list[list[int]]:
    """Word pieces said of every image of `features` (N, G, channels), with its row of `given` (N, K) for its concepts."""
    rows: Iterator[Tensor] = iter(given.split(BATCH))
    model.find_concepts = lambda grid: next(rows)
    said = []
    for start in range(0, len(features), BATCH):
        grid = torch.from_numpy(np.array(features[start : start + BATCH])).float()
        said += [list(found.tokens) for found in beam_search(model, grid, special, BEAM, model.config.max_tokens)]
        task.advance(len(grid))
    return said


def compare(run: Path, name: str) -> list[dict]:
    """A row for each kind of concepts: its CIDEr, how many word pieces an image has, and the difference to the model's own."""
    rows, wanted = {row["name"]: row for row in ledger.read_run(run)}, recipe.read_recipe(run / "recipe.yaml")
    if name not in rows:
        raise ModelError(f"{run}: no finished row '{name}'; there are {', '.join(rows)}")
    model, tokenizer, settings = read_captioner(Artifact(run / rows[name]["artifact"]).path)
    if not model.config.concepts:
        raise ModelError(f"{run}: the model of '{name}' reads no concepts")
    progress, cache = Progress(), cache_of(run)
    val = data.load(wanted.data, cache).split(wanted.data.val_split)
    features = grids(model, val, settings, cache, progress)
    vocabulary = next(stage.config.vocabulary for stage in wanted.stages if stage.kind == "concepts")
    spoken, special = narrowed(model, tokenizer)
    true, pieces, most = mentioned(val, read_concepts(vocabulary)), model.concepts.pieces, model.config.concepts
    with torch.inference_mode():
        scores = torch.cat([model.concept_scores(torch.from_numpy(np.array(features[start : start + BATCH])).float())
                            for start in range(0, len(features), BATCH)])  # fmt: skip
        found = model.concepts.choose(scores, most)
    own = best_concepts(scores, pieces, most)
    kinds = {"found": found, "none": torch.zeros_like(found), "of another image": found.roll(1, 0),
             "precise": spelled(own & true, scores, pieces, most), "oracle": spelled(true, scores, pieces, most)}
    references = [list(example.captions) for example in val.examples]
    answers: list[dict] = []
    for kind, given in kinds.items():
        with progress.task(kind, len(val)) as task:
            said = captions(model, special, features, given, task)
        texts = [decode_caption(tokenizer, spoken[ids].tolist()) for ids in said]
        each = metrics.score(texts, references).per_image
        first = each if not answers else answers[0]["each"]
        gain = paired(each, first) if answers else None
        answers.append({"concepts": kind, "pieces": float((given != 0).sum(1).float().mean()), "cider": float(np.mean(each)), "each": each,
                        "delta": gain.delta if gain else None, "delta_ci95": list(gain.ci95) if gain else None})
    return [{key: value for key, value in answer.items() if key != "each"} for answer in answers]


COLUMNS = {
    "concepts": lambda row: row["concepts"],
    "word pieces": lambda row: number(row["pieces"], ".1f"),
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
