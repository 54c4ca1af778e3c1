"""How much a channel matters, by one of three measures:

`caption`: how much the caption loss would change without it, by the derivative at a gate on it (Molchanov et al., 2019), in absolute value.
`distillation`: how far the model would move from itself without it. Its own KL divergence has no slope where it stands; its curvature there
is the mean square of the gate's derivative over pieces drawn from the model (the Fisher information).
`magnitude`: norms of weights over their mean: of a convolution's channel of what writes it, batch norm folded in, summed over all
convolutions that do; of a hidden channel, of the word embeddings; of others, of what writes them times of what reads them.

A gate on a convolution's channel sits behind its batch norm, where the derivative is weight * d weight + bias * d bias (that of a channel
which a residual sum makes of several convolutions' is the sum of theirs); one on a feed-forward channel, or on a head, sits before the
linear layer that reads it, where it is the sum of W * dW over its columns; one on a hidden channel behind all layer norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.config import Prune
from compress.context import Context
from compress.stages.prune.channels import Unit, dependency_graph, hidden_norms
from compress.training.batches import IGNORED
from compress.training.corpus import corpus
from compress.training.features import device
from students.lightcap import LightCap

BATCHES = 16  # at most
IMAGES = 16


def importance(
    model: LightCap, tokenizer: Tokenizer, settings: dict, wanted: list[Unit], config: Prune, seed: int, context: Context
) -> dict[Unit, Tensor]:
    """Per unit (width,): by `config.importance`, the mean over batches of the gate derivative, absolute or squared; or norms."""
    through_encoder = any(unit.kind == "conv" for unit in wanted)
    if config.importance == "magnitude":
        norms = norms_behind(model) if through_encoder else {}
        return {unit: magnitude(model, unit, norms) for unit in wanted}
    data = corpus(model, tokenizer, settings, context, tuned=through_encoder)
    full, bias = model.word.detach().clone(), model.heads.bias.detach().clone()
    norms = norms_behind(model) if through_encoder else {}
    model.narrow(data.keep)
    where = device()
    model.to(where).eval().requires_grad_(True)
    model.encoder.to(memory_format=torch.channels_last)
    batch_of = data.batches(IMAGES, seed, model.config.mask_piece)
    total = {unit: torch.zeros(unit.width) for unit in wanted}
    source = torch.Generator(where).manual_seed(seed)
    chance = config.importance == "distillation" or model.config.mask_piece is not None
    batches = BATCHES if chance else min(BATCHES, data.steps(1, IMAGES))  # where nothing is drawn, a second look says the same
    with context.progress.task("importance", batches) as task:
        for step in range(batches):
            batch = batch_of(step)
            grid = data.grid_of(model, batch.images)
            states = model.states(grid, batch.tokens, batch.positions, batch.mask(model.config.prefix))
            real = batch.targets != IGNORED
            logits = model.heads(states[real], model.word)
            if config.importance == "caption":
                F.cross_entropy(logits, batch.targets[real], label_smoothing=config.label_smoothing).backward()
            else:
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=source)[:, 0]
                F.cross_entropy(logits, drawn).backward()
            for unit in wanted:
                slope = gate(model, unit, norms)
                total[unit] += (slope.abs() if config.importance == "caption" else slope.square()).cpu()
            model.zero_grad(set_to_none=True)
            task.advance()
    model.cpu()
    model.widen(data.keep, full, 0.0)
    model.heads.bias.data.copy_(bias)
    return {unit: score / batches for unit, score in total.items()}


def gate(model: LightCap, unit: Unit, norms: dict[str, nn.BatchNorm2d]) -> Tensor:
    if unit.kind == "conv":
        behind = [norms[name] for name in unit.writers]
        return sum(norm.weight.detach() * norm.weight.grad + norm.bias.detach() * norm.bias.grad for norm in behind)
    if unit.kind == "hidden":
        return sum(norm.weight.detach() * norm.weight.grad + norm.bias.detach() * norm.bias.grad for norm in hidden_norms(model))
    layer = model.get_submodule(unit.name)
    reader = layer.down if unit.kind == "ffn" else layer.output
    columns = (reader.weight.detach() * reader.weight.grad).sum(0)
    return columns if unit.kind == "ffn" else columns.view(unit.width, -1).sum(1)


@torch.no_grad()
def magnitude(model: LightCap, unit: Unit, norms: dict[str, nn.BatchNorm2d]) -> Tensor:
    """(width,), of mean 1 for each convolution that writes it."""
    module = model.get_submodule(unit.name)
    if unit.kind == "conv":
        return sum(size / size.mean() for size in (written(model.get_submodule(name), norms[name]) for name in unit.writers))
    if unit.kind == "hidden":
        size = model.word.norm(dim=0)
    elif unit.kind == "ffn":
        size = module.up.weight.norm(dim=1) * module.down.weight.norm(dim=0)
    else:
        values = module.value.weight.view(unit.width, -1).norm(dim=1)
        size = values * module.output.weight.t().reshape(unit.width, -1).norm(dim=1)
    return size / size.mean()


def written(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return conv.weight.flatten(1).norm(dim=1) * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()


def norms_behind(model: LightCap) -> dict[str, nn.BatchNorm2d]:
    """For each convolution but the depthwise ones, the batch norm that follows it first."""
    graph = dependency_graph(model)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for module, name in names.items():
        if isinstance(module, nn.Conv2d) and not (module.groups == module.in_channels and module.groups > 1):
            following = [node.module for node in graph.module2node[module].outputs]
            norm = next((after for after in following if isinstance(after, nn.BatchNorm2d)), None)
            if norm is not None:
                found[name] = norm
    return found
