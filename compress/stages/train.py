"""Cross-entropy training: label-smoothed, over cached features (or end to end), an image's captions behind one shared prefix. By
`consensus` captions weigh by how far their image's others agree with them (WXE of Phan et al., 2017, arXiv 1712.09532)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.config import Train, vocabulary_of
from compress.context import Context
from compress.data.concepts import read_concepts
from compress.training.batches import IGNORED
from compress.training.corpus import UNSEEN_BIAS, Corpus, check_tokenizer, corpus
from compress.training.features import device
from compress.training.loop import Group, fit
from compress.training.losses import caption_loss
from compress.training.matching import Matching, replace
from compress.training.mentions import concept_loss, mentioned
from compress.training.reward import CiderReward
from compress.training.softmax import logits_at
from compress.training.start import continued, language, new_captioner, read_captioner, ready, write_captioner
from compress.training.words import Words
from students.lightcap import LightCap
from students.lightcap.fusion import Layer
from students.lightcap.norms import folded

NEW = ("fusion.grid.", "modulator.", "heads.")  # what a language model's checkpoint does not fill


def run(parent: Artifact | None, config: Train, context: Context) -> Artifact:
    """Writes a trained captioner: the preset's, or the parent's further trained with this stage's seed and order."""
    seed = context.seed
    model, tokenizer, settings = started(config, context, seed) if parent is None else continued(parent.path, config.dropout)
    tuned = config.encoder == "tuned"
    data = corpus(model, tokenizer, settings, context, tuned, config.flip, config.crop)
    full = model.word.detach().clone()
    model.narrow(data.keep)
    where = device()
    model.to(where).train()
    ready(model.encoder, tuned, context.recipe.student)
    words = None
    if tuned and config.word_weight:
        shares = torch.from_numpy(data.captions.shares(len(data.keep)))
        torch.manual_seed(seed)
        words = Words(model.config.channels, model.config.grid**2, shares).to(where)
    wanted = None
    if tuned and config.concept_weight:
        wanted = mentioned(context.data.split("train"), read_concepts(vocabulary_of(context.recipe, context.stage))).float().to(where)
    torch.manual_seed(seed)
    matching = Matching(model.word.shape[1]).to(where) if config.matching_weight else None
    weights = weights_of(data, tokenizer, config.consensus, context).to(where) if config.consensus else None
    batch_of = data.batches(config.batch_images, seed, model.config.mask_piece, context.share)

    def loss_of(step: int) -> Tensor:
        batch = batch_of(step)
        grid = F.dropout(data.grid_of(model, batch.images), config.grid_dropout)
        concepts, replaced = replace(model.find_concepts(grid)) if matching is not None else (None, None)
        states = model.states(grid, batch.tokens, batch.positions, batch.mask(model.config.prefix), concepts=concepts)
        real = said = batch.targets != IGNORED
        if replaced is not None:
            real = real & ~replaced.unsqueeze(1)  # a caption says nothing of another picture's concepts
        mean = model.heads.branch_states(states[real]).mean(0)
        logits = logits_at(mean, model.word, model.heads.bias, batch.targets[real].unsqueeze(1))
        loss = caption_loss(logits, config.label_smoothing, None if weights is None else weights[batch.rows][real[said]])
        if words is not None:
            loss = loss + config.word_weight * words.loss(grid.float(), batch.said())
        if wanted is not None:
            loss = loss + config.concept_weight * concept_loss(model.concept_scores(grid), wanted[batch.images])
        if matching is not None:
            loss = loss + config.matching_weight * matching.loss(states[:, 0], replaced)
        return loss

    trained = language(model)
    groups = [
        Group([p for name, p in trained.named_parameters() if not name.startswith(NEW)], config.learning_rate),
        Group([p for name, p in trained.named_parameters() if name.startswith(NEW)], config.new_learning_rate or config.learning_rate),
    ]
    if matching is not None:
        trained["matching"] = matching
        groups.append(Group(list(matching.parameters()), config.new_learning_rate or config.learning_rate))
    if tuned:
        beside = {"encoder": model.encoder, "words": words, "alignment": model.alignment if wanted is not None else None}
        beside = {name: part.requires_grad_(True) for name, part in beside.items() if part is not None}
        trained.update(beside)
        parameters = [parameter for part in beside.values() for parameter in part.parameters()]
        groups.append(Group(parameters, config.encoder_learning_rate))
    steps = data.steps(config.epochs, config.batch_images)
    with folded(model.encoder, model.config.image_size):
        fit(trained, groups, steps, loss_of, config, seed, context.work, context.stage.name, context.progress, context.share)
    model.cpu().eval().requires_grad_(True)
    model.widen(data.keep, full, UNSEEN_BIAS)
    if context.share.rank == 0:
        write_captioner(context.output, model, tokenizer, settings)
    return Artifact(context.output)


def weights_of(data: Corpus, tokenizer: Tokenizer, share: float, context: Context) -> Tensor:
    """(`data.captions.predicted`,) float32, the weight of each predicted piece: its caption's."""
    texts = [list(example.captions) for example in context.data.split("train").examples]
    weights = 1 - share + share * CiderReward.of(texts, tokenizer, context.progress).agreement()
    return torch.from_numpy(np.repeat(weights, np.diff(data.captions.offsets)).astype(np.float32))


def started(config: Train, context: Context, seed: int) -> tuple[LightCap, Tokenizer, dict]:
    """A new captioner of the stage's preset, with the encoder and the concepts of the stage that `extractor` names."""
    student = context.recipe.student
    name = config.preset or student.preset
    extractor = read_captioner(context.artifacts[config.extractor].path)[0] if config.extractor else None
    weights = config.fusion_weights or (student.fusion_weights if name == student.preset else None)
    model, tokenizer, settings = new_captioner(
        student, name, weights, context.recipe.data.image_size, config.dropout, seed, extractor, config.modulator
    )
    check_tokenizer(tokenizer, context)
    silence(model.fusion.layers[: config.zero_layers])
    if config.objective == "masked":
        model.config = dataclasses.replace(model.config, mask_piece=tokenizer.token_to_id("[MASK]"))
    return model, tokenizer, settings


def silence(layers: Iterable[Layer]) -> None:
    """Attention and feed-forward add nothing at first, and norms leave what they read nearly as it was; training finds what they are for.
    MiniLM's own first layer costs a captioner four points of CIDEr (docs/results.md)."""
    for layer in layers:
        for branch in (layer.output, layer.down):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)
        for norm in (layer.norm1, layer.norm2):
            norm.reset_parameters()
