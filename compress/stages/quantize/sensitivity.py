"""What each part loses in INT8: how far the captions' token probabilities move when it alone is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from compress.context import Progress
from compress.stages.quantize.decoder import teacher_forced
from compress.stages.quantize.simulate import parts, simulated, switch
from students.lightcap import LightCap

ALL = "all"


@torch.no_grad()
def sensitivity(
    model: LightCap, encoder: GraphModule, decoder: GraphModule, concepts: GraphModule | None, pixels: Sequence[np.ndarray],
    captions: Sequence[list[list[int]]], progress: Progress, names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Part -> the mean KL divergence, in nats a token, of the graphs' own token probabilities from those with that part rounded; the
    greatest first, and `ALL` for all of them together.

    `encoder`, `decoder` and, where the model has concepts, `concepts` are calibrated graphs; `pixels` are images (3, S, S) as the encoder
    takes them, `captions` the ids of each one's captions with [CLS] and [SEP]; `names` are the parts, if not all. Concepts are those found
    in the grid as it then is."""
    graphs, mask = [simulated(graph) for graph in (encoder, decoder, concepts) if graph is not None], model.config.mask_piece
    encoding, decoding = parts(encoder), parts(decoder)
    names = [name for graph in graphs for name in parts(graph)] if names is None else names

    def read(grid: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The `inputs` of the decoder with another grid (1, G, C), and the concepts found there."""
        return grid, *inputs[1:4], *(model.concepts.choose(extractor(grid), model.config.concepts) for extractor in graphs[2:])

    batches = [torch.from_numpy(np.stack(pixels[start : start + 8])) for start in range(0, len(pixels), 8)]
    with progress.task("sensitivity", len(names) + 2) as task:
        switch(graphs, [])
        plain = grids(graphs[0], batches)
        forced = [teacher_forced(model, grid, ids) for grid, ids in zip(plain.split(1), captions, strict=True)]
        expected = [logs(graphs[1], inputs, mask) for inputs in forced]
        task.advance(1)
        found = {}
        for name in [ALL, *names]:
            switch(graphs, None if name == ALL else [name])
            moved = forced
            if name not in decoding:
                seen = grids(graphs[0], batches) if name == ALL or name in encoding else plain
                moved = [read(grid, inputs) for grid, inputs in zip(seen.split(1), forced, strict=True)]
            total = count = 0.0
            for inputs, before in zip(moved, expected, strict=True):
                after = logs(graphs[1], inputs, mask)
                total += float((before.exp() * (before - after)).sum())
                count += len(before)
            found[name] = total / count
            task.advance(1)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def grids(encoder: GraphModule, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([encoder(batch) for batch in batches])


def logs(decoder: GraphModule, inputs: tuple[Tensor, ...], mask_piece: int | None) -> Tensor:
    """(n, V) log-probabilities at the places that say a piece: all, or the [MASK]s of a model of masked pieces."""
    found = decoder(*inputs)[0].log_softmax(-1)
    return found if mask_piece is None else found[inputs[1][0] == mask_piece]
