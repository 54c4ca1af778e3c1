"""torchao's own integer weights, to compare ours with."""

import importlib
import warnings
from operator import attrgetter

import torch
from torch.fx import GraphModule

from compress.stages.quantize import simulate
from compress.stages.quantize.observe import is_observer


@torch.no_grad()
def converted(prepared: GraphModule, floating=()) -> GraphModule:
    """`prepared` by torchao's conversion with folded weights, rounded as their offsets say."""
    graph = simulate.leave_float(prepared, floating)
    for node in filter(is_observer, graph.graph.nodes):
        offset = getattr(graph.get_submodule(node.target), "offset", None)
        if offset is not None:
            attrgetter(str(node.args[0].target))(graph).add_(offset)
    with warnings.catch_warnings():
        for origin in ("torch", "torchao"):
            warnings.filterwarnings("ignore", module=rf"{origin}(\.|$)")
        return importlib.import_module("torchao.quantization.pt2e.quantize_pt2e").convert_pt2e(graph, fold_quantize=True)
