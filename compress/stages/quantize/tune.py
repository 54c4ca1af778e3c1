"""Quantization-aware fine-tuning: the rounded model learns to say what the float one says (Jacob et al., 2018, without labels)."""

from __future__ import annotations

import copy
import dataclasses

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.config import Optimisation, Quantize
from compress.context import Context
from compress.stages.quantize.calibrate import Calibrated
from compress.stages.quantize.observe import hold_biases, is_observer
from compress.stages.quantize.simulate import WeightRounding, simulated, switch
from compress.training.batches import IGNORED, Captions, image_batches, pack, steps_of
from compress.training.features import device, grids, normalised, pixels, variance
from compress.training.loop import Group, fit
from students.lightcap.tokenizer import encode_captions

BATCH_IMAGES = 16


def tune(found: Calibrated, tokenizer: Tokenizer, settings: dict, config: Quantize, context: Context) -> Calibrated:
    """`config.tune_epochs` over the training images, all parts rounded by the scales that calibration found for activations and by the
    weights' own: minimises the KL divergence of the float model's token probabilities, plus the grid's squared error over its variance.

    Returns the same with a model of the decoder's new weights, and graphs with all new weights and their scales; `found` stays."""
    model, data = found.model, context.data.split("train")
    wanted = grids(model, data, settings, context.cache, context.progress)
    pictures = pixels(data, settings, context.cache, context.progress)
    captions = Captions.of([encode_captions(tokenizer, example.captions, model.config.max_tokens) for example in data.examples])
    scale = variance(wanted)
    where = device()
    graphs = nn.ModuleList([simulated(found.encoder), simulated(found.decoder)]).to(where)
    switch(graphs, None)
    model.to(where)
    parameters = [parameter.requires_grad_(True) for parameter in graphs.parameters()]
    rows_of = image_batches(len(data), BATCH_IMAGES, context.seed)

    def loss_of(step: int) -> Tensor:
        rows = rows_of(step)
        batch = pack(captions, rows).to(where).probing(model.config.mask_piece)
        mask, real = batch.mask(model.config.prefix), batch.targets != IGNORED
        goal = torch.from_numpy(wanted[rows]).to(where).float()
        with torch.no_grad():
            before = model.heads(model.states(goal, batch.tokens, batch.positions, mask)[real], model.word).log_softmax(-1)
            concepts = model.find_concepts(goal)
        grid = graphs[0](normalised(pictures[rows], settings, where))
        inputs = (grid, batch.tokens, batch.positions, mask, *(() if concepts is None else (concepts,)))
        after = graphs[1](*inputs)[real].log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1).mean() + (grid - goal).square().mean() / scale

    steps = steps_of(len(data), config.tune_epochs, BATCH_IMAGES)
    loop = Optimisation(learning_rate=config.tune_learning_rate, weight_decay=0.0, precision="fp32")
    groups = [Group(parameters, config.tune_learning_rate)]
    fit(graphs, groups, steps, loss_of, loop, context.seed, context.work, f"{context.stage.name} tune", context.progress)
    model.cpu()
    graphs.cpu()
    tuned = [take_weights(copy.deepcopy(given), trained) for given, trained in zip((found.encoder, found.decoder), graphs, strict=True)]
    made = copy.deepcopy(model)
    weights = {name.removeprefix("model."): value for name, value in graphs[1].named_parameters()}
    made.load_state_dict(weights, strict=False)  # the encoder's are in its graph, batch norms folded in
    return dataclasses.replace(found, model=made, encoder=tuned[0], decoder=tuned[1])


@torch.no_grad()
def take_weights(calibrated: GraphModule, trained: GraphModule) -> GraphModule:
    """Gives a calibrated graph, in place, the weights of its trained simulation, and the observers of weights a new look at them."""
    values = dict(trained.named_parameters())
    for name, parameter in calibrated.named_parameters():
        parameter.copy_(values[name])
    for node in filter(is_observer, calibrated.graph.nodes):
        observer, rounding = calibrated.get_submodule(node.target), trained.get_submodule(node.target)
        if isinstance(rounding, WeightRounding):
            observer.register_buffer("offset", rounding.offset.clone())
            observer.reset_min_max_vals()
            observer(calibrated.get_parameter(str(node.args[0].target)))
    hold_biases(calibrated)
    return calibrated
