"""The captioners that the benchmarks measure: LightCap-40M with random weights, narrowed, pruned and quantized by the shipped stages.

No checkpoint of LightCap can be had, and none is needed: time, memory and bytes follow from shapes and precision, not from what the weights
say. Batch norms hold the statistics of generated pictures, so that ranges are those of a network that works; the captions mean nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from compress import runtime
from compress.artifact import Artifact, writing
from compress.config import UNRECOVERED, Data, Prune, Quantize, Recipe, Stage, Student
from compress.context import Context, Progress
from compress.cost import costs_of
from compress.data import CaptionSet, load
from compress.data.concepts import read_concepts
from compress.stages import prune, quantize
from compress.stages.concepts import spelled
from compress.stages.export import export
from compress.training.start import read_captioner, write_captioner
from students.lightcap import LightCap, LightCapConfig, preset
from students.lightcap.encoder import preprocessor
from students.lightcap.tokenizer import SPECIAL, characters, narrowed, word_pieces

SEED = 17
BERT_PIECES = 30522
COCO_PIECES = 10000  # what `vocabulary` leaves on COCO: the pieces of its training captions
SYLLABLES = "ba ten ri lo mar ket sun dro ve pol li gra ser ton wick mal ow en der fa".split()
HALF = Prune(macs=0.5, params=0.6, layers=3)  # of the fusion's four; all are met, so that fewer than half of the MACs may stay
SETTLING = 16  # pictures whose statistics the batch norms take


def tokenizer(count: int = BERT_PIECES) -> Tokenizer:
    """`count` pieces: special tokens, characters, the words of the concepts, then made-up words of two to four syllables."""
    concepts = sorted({word for name in read_concepts() for word in name.replace("-", " ").split()})
    made = ("".join(parts) for length in (2, 3, 4) for parts in itertools.product(SYLLABLES, repeat=length))
    pieces = dict.fromkeys(itertools.chain(SPECIAL, characters(), concepts, made))
    return word_pieces(list(itertools.islice(pieces, count)))


def scenes(images: int) -> CaptionSet:
    """Generated scenes of 224 x 224 with five captions each, split `train`."""
    return load(Data(source="scenes", train_images=images, val_images=1, image_size=224), only="train")


def pixels(data: CaptionSet, settings: dict) -> np.ndarray:
    """(N, 3, S, S) float32."""
    return np.stack([runtime.pixels(data.image(example), settings) for example in data.examples])


def lightcap(with_concepts: bool, data: CaptionSet) -> tuple[LightCap, Tokenizer, dict]:
    """The preset with random weights, 30,522 pieces and, `with_concepts`, the shipped list of concepts in a text space of 1,024."""
    torch.manual_seed(SEED)
    words = tokenizer()
    config = preset("lightcap", vocabulary=words.get_vocab_size())
    if not with_concepts:
        config = dataclasses.replace(config, concepts=0, alignment=None, modulator=None)
    model = LightCap(config).eval()
    settings = preprocessor(model.config.encoder, model.config.image_size)
    if with_concepts:
        names = read_concepts()
        inner, text = model.config.alignment
        matrix = nn.functional.normalize(torch.randn(len(names), text), dim=1)
        model.start_concepts(matrix, spelled(names, words), torch.zeros(len(names)), inner, model.config.concepts)
    settle(model, torch.from_numpy(pixels(data, settings)[:SETTLING]))
    return model, words, settings


def settle(model: LightCap, batch: torch.Tensor) -> None:
    """Gives the batch norms the statistics of `batch` (N, 3, S, S), as training would."""
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of what is seen, not a moving one
    with torch.no_grad():
        model.encoder.train()(batch)
    model.eval()


def row(artifact: Artifact) -> dict:
    """What `artifact` is, beside its speed. `bytes` are those of the files needed to caption, with the concept extractor and without."""
    config = LightCapConfig.from_dict(artifact.config)
    costs = costs_of(config, 8 if artifact.quantized else 32)
    return {
        "params": costs["params"], "gmacs_caption": round(costs["gmacs_caption"], 6), "gmacs_encoder": round(costs["gmacs_encoder"], 6),
        "word_pieces": config.vocabulary, "bytes": artifact.bytes(), "bytes_without_concepts": artifact.bytes() - concept_bytes(artifact),
    }


def concept_bytes(artifact: Artifact) -> int:
    """Bytes on disk of the concept extractor: its graph, or its tensors. (The modulator, 0.1 MB in INT8, is in the decoder and stays.)"""
    if artifact.graphs:
        graph = artifact.path / "concepts.onnx"
        return graph.stat().st_size if graph.is_file() else 0
    parts = read_captioner(artifact.path)[0].state_dict().items()
    return sum(tensor.nbytes for name, tensor in parts if name.startswith(("alignment.", "concepts.")))


def write(folder: Path, model: LightCap, words: Tokenizer, settings: dict) -> Artifact:
    write_captioner(folder, model, words, settings)
    return Artifact(folder)


def narrow(artifact: Artifact, folder: Path, pieces: int = COCO_PIECES) -> Artifact:
    """`artifact` over its first `pieces` word pieces, as the stage `vocabulary` leaves it."""
    model, words, settings = read_captioner(artifact.path)
    model.narrow(torch.arange(pieces))
    return write(folder, model, narrowed(words, range(pieces)), settings)


def context(data: CaptionSet, output: Path, kind: str, config: Prune | Quantize, progress: Progress) -> Context:
    """What the pipeline would give a stage on `data`."""
    output.mkdir(parents=True, exist_ok=True)
    stage = Stage(kind, kind, None, config)
    recipe = Recipe("benchmark", SEED, Data(), Student(), (stage,), Path("benchmark"))
    scratch = output.parent / f"work{output.name}"  # not taken for a half-written output
    return Context(recipe=recipe, stage=stage, data=data, seed=SEED, output=output, work=scratch, cache=scratch, artifacts={},
                   progress=progress)


def quantized(artifact: Artifact, folder: Path, data: CaptionSet, progress: Progress, config: Quantize) -> Artifact:
    """The stage `quantize`, calibrated on `data`."""
    quantize.run(artifact, config, context(data, folder, "quantize", config, progress))
    return Artifact(folder)


def pruned(artifact: Artifact, folder: Path, data: CaptionSet, progress: Progress, config: Prune) -> Artifact:
    """The stage `prune`, by importance on `data`, without any recovery: what is timed is a shape."""
    config = dataclasses.replace(config, **UNRECOVERED)
    given = context(data, folder, "prune", config, progress)
    prune.run(artifact, config, given)
    shutil.rmtree(given.work, ignore_errors=True)
    return Artifact(folder)


def build(name: str, folder: Path, images: int, with_concepts: bool = True) -> Artifact:
    """The captioner `name`, made in `folder` from those it comes from, or found there: `eager` (30,522 pieces), `onnx` (its fp32 export),
    `small` (10,000 pieces), `int8`, `pruned` (`small` cut to HALF), `pruned-int8`, these two with weights of 7 bits (`int8-reduced`,
    `pruned-int8-reduced`), and `int8-export`. `images`: how many generated scenes calibrate, and say which channels matter. Its folder is
    named by all three, so that no other is taken for it."""
    progress, data = Progress(), scenes(images)

    def parent(name: str) -> Artifact:
        return build(name, folder, images, with_concepts)

    def integer(name: str, out: Path, reduce_range: bool = False) -> None:
        quantized(parent(name), out, data, progress, Quantize(calibration_images=images, reduce_range=reduce_range))

    makers: dict[str, Callable[[Path], object]] = {
        "eager": lambda out: write(out, *lightcap(with_concepts, data)),
        "onnx": lambda out: export(parent("eager"), out),
        "small": lambda out: narrow(parent("eager"), out),
        "int8": lambda out: integer("small", out),
        "int8-reduced": lambda out: integer("small", out, reduce_range=True),
        "pruned": lambda out: pruned(parent("small"), out, data, progress, HALF),
        "pruned-int8": lambda out: integer("pruned", out),
        "pruned-int8-reduced": lambda out: integer("pruned", out, reduce_range=True),
        "int8-export": lambda out: export(parent("int8"), out),
    }
    place = folder / f"{name}-{images}{'' if with_concepts else '-without-concepts'}"
    if not place.is_dir():
        with writing(place) as out:
            makers[name](out)
        progress.log(f"{name} is built")
    return Artifact(place)
