"""The concept extractor as an ONNX graph: grid -> the word pieces of the concepts in it."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from compress.stages.export.modules import ConceptScores
from compress.stages.export.writer import Writer, ints, products
from students.lightcap import LightCap
from students.lightcap.concepts import NONE


def concepts_graph(model: LightCap) -> ModelProto:
    """grid (N, G, C) -> concepts (N, K) word pieces. Its layers' weights have the names that they have in `ConceptScores`."""
    known, config = ConceptScores(model), model.config
    weights = {"windows": known.windows, "prior": known.prior, "pieces": model.concepts.pieces} | products("first", known.first)
    matching = [f"matching.{index}" for index in range(len(known.matching))]
    for name, layer in zip(matching, known.matching, strict=True):
        weights |= products(name, layer)
    write = Writer(weights)
    x = write("Relu", write("MatMul", "windows", write.product("grid", "first")))
    for name in matching:
        x = write.product(x, name)
    choose(write, log_odds(write, x), *model.concepts.pieces.shape, config.concepts)
    grid = (TensorProto.FLOAT, ("n", config.grid**2, config.channels))
    return write.model({"grid": grid}, {"concepts": (TensorProto.INT64, ("n", config.concepts))})


def log_odds(write: Writer, found: str) -> str:
    """What each region (N, W, count) says -> scores (N, count)."""
    top = write("ReduceMax", found, ints(1), keepdims=1)
    total = write("ReduceSum", write("Exp", write("Sub", found, top)), ints(1), keepdims=0)
    return write("Add", write("Add", write("Log", total), write("Gather", top, np.array(0), axis=1)), "prior")


def choose(write: Writer, scores: str, count: int, longest: int, most: int) -> None:
    """`ConceptVocabulary.choose`: scores (N, count) -> concepts (N, most)."""
    best, some = "best", min(most, count)
    write("TopK", scores, ints(some), out=("best_scores", best), axis=1)
    flat = write("Reshape", write("Gather", "pieces", best, axis=0), ints(-1, some * longest))
    real = write("Not", write("Equal", flat, np.array(NONE)))
    place = write("Sub", write("CumSum", write("Cast", real, to=TensorProto.INT64), np.array(1)), np.array(1))
    kept = write("And", real, write("Less", place, np.array(most)))
    place = write("Where", kept, place, np.array(most))  # what is left out goes behind the end, which is dropped
    shape = write("Concat", write("Shape", flat, start=0, end=1), ints(most + 1), axis=0)
    blank = write("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, np.int64)))
    write("Slice", write("ScatterElements", blank, place, flat, axis=1), ints(0), ints(most), ints(1), out="concepts")
