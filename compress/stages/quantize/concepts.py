"""The INT8 concept extractor: its layers as integer products, as in the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx import ModelProto
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

from compress.config import Quantize
from compress.context import Progress
from compress.stages import export
from compress.stages.quantize import observe
from compress.stages.quantize.decoder import make_integer
from compress.stages.quantize.gptq import IMAGES, gptq
from students.lightcap import LightCap

LARGEST = 4096  # batch


def calibrated(model: LightCap, grids: Sequence[Tensor], config: Quantize, progress: Progress) -> GraphModule:
    """grid -> scores of the concepts, with observers that saw `grids`, (1, G, C) each."""
    grid = torch.zeros(2, model.config.grid**2, model.config.channels)
    prepared = observe.prepare(export.ConceptScores(model), (grid,), ({0: Dim("images", min=1, max=LARGEST)},), config.reduce_range)
    samples = [(grid,) for grid in grids]
    observe.run(prepared, samples)
    if config.rounding == "gptq":
        gptq(prepared, samples[:IMAGES], progress)
    return prepared


def quantized_concepts(model: LightCap, prepared: GraphModule) -> ModelProto:
    """grid -> word pieces of the concepts, by what `calibrated` gives."""
    proto = export.concepts_graph(model)
    make_integer(proto.graph, {f"scores.{name}": scale for name, scale in observe.linear_scales(prepared).items()})
    return proto
