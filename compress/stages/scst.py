"""CIDEr optimisation by self-critical sequence training (Rennie et al., CVPR 2017): captions drawn from the model itself are made more
likely as far as their CIDEr-D exceeds a baseline: the mean of the image's other samples (Luo, 2020), or the greedy caption.

Captions are drawn without dropout, in training's precision: by chance at `temperature`, or as the hypotheses of a beam search (Cornia
et al., CVPR 2020). The reward's document frequencies come from the training references. Where pictures are disturbed the frozen encoder
sees them anew in each step: an encoder that was tuned on these pictures knows them better than it will know others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.config import Scst
from compress.context import Context
from compress.decode import Special, beam_search, beams, sample
from compress.training.batches import IGNORED, Captions, pack
from compress.training.corpus import UNSEEN_BIAS, corpus
from compress.training.features import device
from compress.training.loop import Group, fit
from compress.training.reward import CiderReward
from compress.training.softmax import logits_at
from compress.training.start import continued, language, write_captioner
from students.lightcap import LightCap
from students.lightcap.norms import folded


def run(parent: Artifact, config: Scst, context: Context) -> Artifact:
    """Writes the parent, further trained towards CIDEr-D."""
    seed = context.seed
    model, tokenizer, settings = continued(parent.path, config.dropout)
    data = corpus(model, tokenizer, settings, context, bool(config.flip or config.crop), config.flip, config.crop)
    reward = CiderReward.of([example.captions for example in context.data.split("train").examples], tokenizer)
    full = model.word.detach().clone()
    model.narrow(data.keep)
    special = Special.of(tokenizer).among(data.keep)
    where = device()
    model.to(where)
    model.encoder.to(memory_format=torch.channels_last)
    trained = language(model)
    batch_of = data.batches(config.batch_images, seed, share=context.share)

    def score(images: np.ndarray, captions: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        return reward(images, [[data.keep[list(ids)].tolist() for ids in drawn] for drawn in captions]) / 100

    def loss_of(step: int) -> Tensor:
        images = batch_of(step).images
        with torch.no_grad():
            grid = data.grid_of(model.eval(), images)
        drawn = draw(model, grid, special, config, seed * 1_000_003 + step + context.share.rank * 1_000_000_007)
        rewards = score(images, drawn)
        if config.baseline == "mean":
            baseline = (rewards.sum(1, keepdims=True) - rewards) / (config.samples - 1)
        else:
            greedy = beam_search(model.eval(), grid, special, 1, model.config.max_tokens)
            baseline = score(images, [[item.tokens] for item in greedy])
        model.train().encoder.eval()
        return policy_loss(model, grid, drawn, rewards - baseline, special, config.temperature)

    groups = [Group(list(trained.parameters()), config.learning_rate)]
    steps = data.steps(config.epochs, config.batch_images)
    with folded(model.encoder, model.config.image_size):
        fit(trained, groups, steps, loss_of, config, seed, context.work, context.stage.name, context.progress, context.share)
    model.cpu().eval().requires_grad_(True)
    model.widen(data.keep, full, UNSEEN_BIAS)
    if context.share.rank == 0:
        write_captioner(context.output, model, tokenizer, settings)
    return Artifact(context.output)


def draw(model: LightCap, grid: Tensor, special: Special, config: Scst, seed: int) -> list[list[tuple[int, ...]]]:
    """`config.samples` captions of each image, from the model without dropout; of a search, its best."""
    model.eval()
    count, longest = config.samples, model.config.max_tokens
    if config.draw == "samples":
        found = sample(model, grid, special, count, longest, seed, config.temperature)
    else:
        found = [sorted(ended, reverse=True)[:count] for ended in beams(model, grid, special, count, longest)]
        found = [ended + ended[:1] * (count - len(ended)) for ended in found]
    return [[item.tokens for item in drawn] for drawn in found]


def policy_loss(
    model: LightCap, grid: Tensor, drawn: Sequence[Sequence[Sequence[int]]], advantages: np.ndarray, special: Special, temperature: float
) -> Tensor:
    """-advantage x log-probability (at `temperature`), summed over the pieces of every drawn caption ([SEP] included where it ended), over
    their number.

    advantages (B, count). A caption that fills `max_tokens` did not end: its [SEP] was never drawn.
    """
    longest = model.config.max_tokens
    captions = [[[special.start, *ids] + [special.end] * (len(ids) < longest) for ids in image] for image in drawn]
    plain = pack(Captions.of(captions), range(len(captions))).to(grid.device)
    batch = plain.probing(model.config.mask_piece)
    states = model.states(grid, batch.tokens, batch.positions, batch.mask(model.config.prefix))
    real = batch.targets != IGNORED
    mean = model.heads.branch_states(states[real]).mean(0) / temperature
    logs = logits_at(mean, model.word, model.heads.bias / temperature, batch.targets[real].unsqueeze(1)).logs[:, 0]
    weight = torch.from_numpy(advantages).to(grid.device, logs.dtype)
    row, segment = real.nonzero()[:, 0], batch.segments[real] - 1
    return -(weight[row, segment] * logs).mean()
