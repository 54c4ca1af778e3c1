"""The captions of a run's INT8 model by PyTorch's quantized graph and by ONNX Runtime, greedy: how many are equal, how near the others are.

    python benchmarks/equality.py runs/photos [--floats]

The run's float captioner is quantized again as its INT8 artifact says, tuned too, so the run must be where its data can be read. README.md
says what each number is. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integers import PRODUCTS, SUMS, greedy, integer
from quantized import Quantized, quantized

from compress import runtime
from compress.artifact import GRAPH_PATTERNS
from compress.cache import cache_of
from compress.context import Context, Progress
from compress.decode import Special
from compress.errors import LightcapError, ModelError
from compress.process import thread_count
from compress.stages import quantize
from compress.stages.quantize import calibrate, simulate
from compress.stages.quantize.tune import tune
from students.lightcap.tokenizer import decode_caption

BATCH = 25


def compare(run: Path, floats: bool) -> dict:
    """By sums of integers, or of rounded `floats`: `arithmetic`, `float_parts`, `encoder_floats` (the encoder's products and sums that are
    not of integers), `same_graphs`, `images`, `equal` and its `share`, `grids_equal`, and the `differences`, each with both captions
    and the gap in nats."""
    progress, of = Progress(), quantized(run)
    if of.made is None:
        raise ModelError(f"{run}: '{of.stage.name}' is not finished")
    model, tokenizer, settings, config = of.model, of.tokenizer, of.settings, of.stage.config
    described = of.made.config["quantized"]
    floating, epochs = described["float_parts"], described["tune_epochs"]
    found = calibrate.calibrate(model, tokenizer, settings, config, of.data, of.recipe.seed, progress)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "int8"
        written.mkdir()
        if epochs:
            found = tune(found, tokenizer, settings, config, context(run, of, Path(folder), progress))
        quantize.write(written, of.parent, found, config, floating, epochs, progress)
        captioner = runtime.Captioner(written)
        files = [file for pattern in GRAPH_PATTERNS for file in written.glob(pattern)]
        same = all((of.made.path / file.name).read_bytes() == file.read_bytes() for file in files)
    calibrated = [graph for graph in (found.encoder, found.decoder, found.concepts) if graph is not None]
    computed = [simulate.simulated(simulate.leave_float(graph, floating)) for graph in calibrated]
    if not floats:
        computed = [integer(graph, model.config.prefix) for graph in computed]
    encoding, decoding, *concepts = computed
    of_floats = sum(node.target in PRODUCTS | SUMS for node in encoding.graph.nodes)
    special, val = Special.of(tokenizer), of.data.split(of.recipe.data.val_split)
    differences, grids_equal = [], 0
    with progress.task("captions", len(val)) as task:
        for start in range(0, len(val), BATCH):
            examples = val.examples[start : start + BATCH]
            pixels = np.stack([runtime.pixels(val.image(example), settings) for example in examples])
            theirs = captioner.encode(pixels)
            with torch.no_grad():
                grid = encoding(torch.from_numpy(pixels))
                said, logits = greedy(decoding, model, grid, special, *concepts)
            grids_equal += int((grid.numpy() == theirs).all((1, 2)).sum())
            heard = captioner.search(theirs, 1, model.config.max_tokens)
            for example, mine, (other, _), chosen in zip(examples, said, heard, logits.log_softmax(-1), strict=True):
                if mine != other:
                    texts = {name: decode_caption(tokenizer, ids) for name, ids in (("pytorch", mine), ("onnxruntime", other))}
                    gap = first_gap([*mine, special.end], [*other, special.end], chosen)
                    differences.append({"image": example.image_id, **texts, "gap": gap})
            task.advance(len(examples))
    equal = len(val) - len(differences)
    how = {"arithmetic": "rounded floats" if floats else "integers", "float_parts": floating, "encoder_floats": of_floats}
    return how | {"same_graphs": same, "images": len(val), "equal": equal, "share": equal / len(val), "grids_equal": grids_equal,
            "differences": differences, "largest_gap": max((item["gap"] for item in differences), default=0.0)}


def context(run: Path, of: Quantized, folder: Path, progress: Progress) -> Context:
    """What the stage would get; its resume state in `folder`."""
    return Context(recipe=of.recipe, stage=of.stage, data=of.data, seed=of.recipe.seed, output=folder, work=folder / "work",
                   cache=cache_of(run), artifacts={}, progress=progress)


def first_gap(mine: list[int], theirs: list[int], logs: torch.Tensor) -> float:
    """Nats between two choices where they part; `logs` (T, V) made `mine`."""
    place = next(index for index, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    return float(logs[place, mine[place]] - logs[place, theirs[place]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run with a quantize stage")
    parser.add_argument("--floats", action="store_true", help="PyTorch adds rounded floats, as where parts are measured and weights tuned")
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    try:
        found = compare(arguments.run, arguments.floats)
    except LightcapError as error:
        parser.exit(2, f"equality.py: {error.message}\n")
    for item in found["differences"]:
        print(f"{item['image']}: '{item['pytorch']}' and '{item['onnxruntime']}', {item['gap']:.4f} nats apart")
    print(f"the graphs are {'' if found['same_graphs'] else 'not '}those of the run, byte for byte")
    print(f"{found['equal']} of {found['images']} captions are equal, and {found['grids_equal']} grids, by sums of {found['arithmetic']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
