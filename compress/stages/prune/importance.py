"""How much a channel matters, by one of three measures:

`caption`: half of the mean square of the caption loss's derivative at a gate on it (Molchanov et al., 2019; Theis et al., 2018).
`distillation`: the same for pieces drawn from the model itself: how far it would move from itself without the channel. Its own KL
divergence has no slope where it stands; this is its curvature there (the Fisher information).
`magnitude`: norms of weights over their mean: of a convolution's channel of what writes it, batch norm folded in, summed over all
convolutions that do; of a hidden channel, of the word embeddings; of others, of what writes them times of what reads them.

Squares are of whole pictures' derivatives, over their pieces, so that these two are in nats a piece. A gate sits where a channel is read by
what mixes it with others: behind activations and depthwise convolutions, since those of the channel leave with it; one on a hidden channel
sits behind all layer norms. What the concept extractor finds is chosen, and no derivative goes through a choice: there a channel matters by
the variance that it gives to the regions, whose level `sensitivity.py` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.config import Prune
from compress.context import Context
from compress.stages.prune.channels import Unit, hidden_norms
from compress.training.batches import IGNORED
from compress.training.corpus import corpus
from compress.training.features import device
from students.lightcap import LightCap
from students.lightcap.norms import read_by_norms

BATCHES = 16  # at most
IMAGES = 16


def importance(
    model: LightCap, tokenizer: Tokenizer, settings: dict, wanted: list[Unit], config: Prune, seed: int, context: Context
) -> dict[Unit, Tensor]:
    """Per unit (width,), by `config.importance`."""
    through_encoder = any(unit.kind == "conv" for unit in wanted)
    if config.importance == "magnitude":
        norms = norms_behind(model) if through_encoder else {}
        return {unit: magnitude(model, unit, norms) for unit in wanted}
    data = corpus(model, tokenizer, settings, context, tuned=through_encoder)
    full, bias = model.word.detach().clone(), model.heads.bias.detach().clone()
    model.narrow(data.keep)
    where = device()
    model.to(where).eval().requires_grad_(True)
    model.encoder.to(memory_format=torch.channels_last)
    batch_of = data.batches(IMAGES, seed, model.config.mask_piece)
    derived = [unit for unit in wanted if unit.kind != "concept"]
    total = {unit: torch.zeros(unit.width, device=where) for unit in derived}
    regions: list[Tensor] = []
    pieces = 0
    source = torch.Generator(where).manual_seed(seed)
    chance = config.importance == "distillation" or model.config.mask_piece is not None
    batches = BATCHES if chance else min(BATCHES, data.steps(1, IMAGES))  # where nothing is drawn, a second look says the same
    with context.progress.task("importance", batches) as task:
        for step in range(batches):
            batch = batch_of(step)
            real = batch.targets != IGNORED
            with gates(model, derived, real.nonzero()[:, 0]) as slopes:
                grid = data.grid_of(model, batch.images)
                states = model.states(grid, batch.tokens, batch.positions, batch.mask(model.config.prefix))
                logits = model.heads(states[real], model.word)
                if config.importance == "caption":
                    F.cross_entropy(logits, batch.targets[real], label_smoothing=config.label_smoothing, reduction="sum").backward()
                else:
                    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=source)[:, 0]
                    F.cross_entropy(logits, drawn, reduction="sum").backward()
            for unit in derived:
                total[unit] += slopes[unit].square().sum(0)
            if len(derived) < len(wanted):
                with torch.no_grad():
                    regions.append(model.alignment.inner(grid, model.windows).flatten(0, 1).cpu())
            pieces += int(real.sum())
            model.zero_grad(set_to_none=True)
            task.advance()
    model.cpu()
    model.widen(data.keep, full, 0.0)
    model.heads.bias.data.copy_(bias)
    found = {unit: (score / (2 * pieces)).cpu() for unit, score in total.items()}
    return {unit: found[unit] if unit in found else given(model, regions) for unit in wanted}


@contextmanager
def gates(model: LightCap, wanted: Sequence[Unit], picture: Tensor) -> Iterator[dict[Unit, Tensor]]:
    """Inside, what is computed gets gates; after its backward pass, their derivatives by unit: (pictures, width). `picture` (n,) is the
    picture of each prediction: those alone go through the heads."""
    slopes: dict[Unit, Tensor] = {}
    count = int(picture.max()) + 1

    def gated(unit: Unit, x: Tensor) -> Tensor:
        value = x.detach()
        own = x.view_as(x)  # its gradient is this reader's alone
        own.register_hook(lambda slope: slopes.__setitem__(unit, slopes.get(unit, 0.0) + by_picture(unit, value * slope)))
        return own

    def by_picture(unit: Unit, product: Tensor) -> Tensor:
        if unit.kind == "conv":
            return product.sum((2, 3))
        if product.dim() == 2:
            return product.new_zeros(count, product.shape[1]).index_add(0, picture, product)
        summed = product.sum(1)
        return summed.view(len(summed), unit.width, -1).sum(2)

    hooks = []
    for unit in wanted:
        if unit.kind == "hidden":
            hooks += [norm.register_forward_hook(lambda _, __, out, unit=unit: gated(unit, out)) for norm in hidden_norms(model)]
        for name in unit.readers:
            reader = model.get_submodule(name)
            hooks.append(reader.register_forward_pre_hook(lambda _, inputs, unit=unit: (gated(unit, inputs[0]), *inputs[1:])))
    try:
        yield slopes
    finally:
        for hook in hooks:
            hook.remove()


def given(model: LightCap, regions: list[Tensor]) -> Tensor:
    """The variance that each inner channel of the concept extractor gives to what it says of a region, (inner,); `regions` are what its
    second layer reads, batches of (R, inner)."""
    return torch.cat(regions).var(0) * model.alignment.second.weight.detach().square().sum(0)


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
    elif unit.kind == "concept":
        size = module.first.weight.norm(dim=1) * module.second.weight.norm(dim=0)
    else:
        values = module.value.weight.view(unit.width, -1).norm(dim=1)
        size = values * module.output.weight.t().reshape(unit.width, -1).norm(dim=1)
    return size / size.mean()


def written(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return conv.weight.flatten(1).norm(dim=1) * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()


def norms_behind(model: LightCap) -> dict[str, nn.BatchNorm2d]:
    """For each convolution, by name, the batch norm that reads it."""
    names = {module: name for name, module in model.named_modules()}
    return {names[conv]: norm for conv, norm in read_by_norms(model.encoder, model.config.image_size)}
