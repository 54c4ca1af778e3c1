"""The captions of a run's INT8 model by PyTorch's quantized graph and by ONNX Runtime, greedy: how many are equal, how near the others are.

    python benchmarks/equality.py runs/photos

The stage's calibration is run again, from the run's recipe, so the run must be where its data can be read. A difference is where the two
first choose another piece; its gap is by how much PyTorch's log-probability of its own choice exceeds that of ONNX Runtime's. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress import artifact, data, ledger, recipe, runtime  # noqa: E402
from compress.cache import cache_of  # noqa: E402
from compress.context import Progress  # noqa: E402
from compress.decode import Special  # noqa: E402
from compress.errors import LightcapError, ModelError  # noqa: E402
from compress.pipeline import thread_count  # noqa: E402
from compress.stages import quantize  # noqa: E402
from compress.stages.quantize import encoder, simulate  # noqa: E402
from compress.training.start import read_captioner  # noqa: E402
from students.lightcap.tokenizer import decode_caption  # noqa: E402

BATCH = 25
BEFORE = {"smoothing": 0.0, "rounding": "nearest"}  # of an artifact that does not say


def compare(run: Path) -> dict:
    """`images`, `equal` and its `share`, and the `differences`, each with both captions and the gap in nats."""
    progress, rows = Progress(), {row["name"]: row for row in ledger.read_run(run)}
    wanted = recipe.read_recipe(run / "recipe.yaml")
    stage = next((stage for stage in wanted.stages if stage.kind == "quantize"), None)
    if stage is None or not {stage.name, stage.parent} <= rows.keys():
        raise ModelError(f"{run}: no finished quantize stage")
    made, parent = (artifact.Artifact(run / rows[name]["artifact"]) for name in (stage.name, stage.parent))
    described = made.config["quantized"]
    if described.get("float_parts") or described.get("tune_epochs"):
        raise ModelError(f"{run}: '{stage.name}' was tuned or has float parts, and only calibration can be repeated")
    if made.config.get("concepts") or made.config.get("mask_piece") is not None:
        raise ModelError(f"{run}: '{stage.name}' reads concepts or predicts masked pieces, which PyTorch's graph here does not")
    pictures = data.load(wanted.data, cache_of(run))
    model, tokenizer, settings = read_captioner(parent.path)
    config = dataclasses.replace(stage.config, **{key: described.get(key, kept) for key, kept in BEFORE.items()})
    found = quantize.calibrate(model, tokenizer, settings, config, pictures, wanted.seed, progress)
    graphs = encoder.fold(simulate.leave_float(found.encoder, ())), simulate.simulated(found.decoder)
    captioner, special = runtime.Captioner(made.path), Special.of(tokenizer)
    val = pictures.split(wanted.data.val_split)
    differences = []
    with progress.task("captions", len(val)) as task:
        for start in range(0, len(val), BATCH):
            examples = val.examples[start : start + BATCH]
            pixels = np.stack([runtime.pixels(val.image(example), settings) for example in examples])
            with torch.no_grad():
                said, logits = simulate.greedy(graphs[1], model, graphs[0](torch.from_numpy(pixels)), special)
            theirs = captioner.search(captioner.encode(pixels), 1, model.config.max_tokens)
            for example, mine, (other, _), chosen in zip(examples, said, theirs, logits.log_softmax(-1), strict=True):
                if mine != other:
                    texts = {name: decode_caption(tokenizer, ids) for name, ids in (("pytorch", mine), ("onnxruntime", other))}
                    gap = first_gap([*mine, special.end], [*other, special.end], chosen)
                    differences.append({"image": example.image_id, **texts, "gap": gap})
            task.advance(len(examples))
    equal = len(val) - len(differences)
    return {"images": len(val), "equal": equal, "share": equal / len(val), "differences": differences,
            "largest_gap": max((item["gap"] for item in differences), default=0.0)}


def first_gap(mine: list[int], theirs: list[int], logs: torch.Tensor) -> float:
    """Nats between two choices where they part; `logs` (T, V) made `mine`."""
    place = next(index for index, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    return float(logs[place, mine[place]] - logs[place, theirs[place]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run with a quantize stage")
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    try:
        found = compare(arguments.run)
    except LightcapError as error:
        parser.exit(2, f"equality.py: {error.message}\n")
    for item in found["differences"]:
        print(f"{item['image']}: '{item['pytorch']}' and '{item['onnxruntime']}', {item['gap']:.4f} nats apart")
    print(f"{found['equal']} of {found['images']} captions are equal")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
