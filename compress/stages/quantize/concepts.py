"""The INT8 concept extractor: its layers as integer products, as in the decoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from compress.config import Quantize
from compress.context import Progress
from compress.stages.export.extractor import concepts_graph
from compress.stages.export.modules import ConceptScores
from compress.stages.quantize import observe
from compress.stages.quantize.decoder import make_integer
from compress.stages.quantize.gptq import IMAGES, gptq
from compress.stages.quantize.simulate import part_named
from students.lightcap import LightCap

LARGEST = 4096  # batch


class Extractor(nn.Module):
    """`ConceptScores` under the name that its parts have."""

    def __init__(self, model: LightCap) -> None:
        super().__init__()
        self.concepts = ConceptScores(model)

    def forward(self, grid: Tensor) -> Tensor:
        return self.concepts(grid)


def calibrated(model: LightCap, grids: Sequence[Tensor], config: Quantize, progress: Progress) -> GraphModule:
    """grid -> scores of the concepts, with observers that saw `grids`, (1, G, C) each."""
    grid = torch.zeros(2, model.config.grid**2, model.config.channels)
    prepared = observe.prepare(Extractor(model), (grid,), ({0: Dim("images", min=1, max=LARGEST)},), config.reduce_range)
    samples = [(grid,) for grid in grids]
    observe.run(prepared, samples)
    if config.rounding == "gptq":
        gptq(prepared, samples[:IMAGES], progress)
    return prepared


def quantized_concepts(model: LightCap, prepared: GraphModule, floating: Collection[str] = ()) -> ModelProto:
    """grid -> word pieces of the concepts. `prepared`: what `calibrated` gives; `floating`: parts (`simulate.parts`) that keep their float
    weights."""
    found = observe.linear_scales(prepared)
    names = {name: name.removeprefix("concepts.") for name in found}  # in the graph
    float_weights = {names[name] for name in found if part_named(name.removesuffix(".weight")) in floating}
    proto = concepts_graph(model)
    make_integer(proto.graph, {names[name]: scale for name, scale in found.items()}, float_weights)
    return proto
