"""What the stages of a recipe will compute, before any has run: multiply-accumulates, x 1e-12.

A trained product costs three of its forward pass (itself, and two in the backward pass). An image's captions share one prefix, frozen
features are computed once by each stage (in each pass where pictures are disturbed), and the output product is over the words that captions
use. Recovery after pruning is counted at its parent's size: an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.architectures import architectures
from compress.config import Concepts, Distill, Prune, Quantize, Recipe, Scst, Stage, Train
from compress.conflicts import cuts_encoder, moves_concepts
from compress.cost import TOKENS, Macs, count_macs
from compress.data import CaptionSet
from compress.evaluate import BEAM
from compress.training.batches import Masking
from compress.training.lessons import listened_to
from students.lightcap import LightCapConfig


@dataclass(frozen=True)
class Amount:
    """Of the train split: images, captions per image, words per caption, distinct words. Of the one that is evaluated: images."""

    images: int
    captions: float
    words: float
    vocabulary: int
    evaluated: int

    @staticmethod
    def of(data: CaptionSet, split: str) -> Amount:
        counts = data.splits()
        words = [caption.lower().split() for example in data.examples if example.split == "train" for caption in example.captions]
        images, total = counts.get("train", 0), sum(map(len, words))
        distinct = len({word for caption in words for word in caption})
        return Amount(images, len(words) / max(images, 1), total / max(len(words), 1), max(distinct, 1), counts.get(split, 0))


# Karpathy's split of COCO, `restval` among its 113,287 training images; what is said of words is rough, and enough for a plan.
COCO = Amount(images=113_287, captions=5.0, words=10.0, vocabulary=30_000, evaluated=5_000)


def tmacs(recipe: Recipe, data: CaptionSet | None) -> dict[str, float | None]:
    """{stage: multiply-accumulates x 1e-12 of making and of evaluating its artifact}, on `COCO` where there is no data; None of a finished
    captioner, whose sizes are its own. RecipeError as `architectures`."""
    amount = COCO if data is None else Amount.of(data, recipe.data.val_split)
    models, sights = architectures(recipe, amount.vocabulary)
    spent = {}
    for stage in recipe.stages:
        if stage.kind == "pretrained":
            spent[stage.name] = None
            continue
        config = models[stage.name]
        macs = count_macs(config)
        spent[stage.name] = (making(stage, config, macs, models, sights, amount) + evaluating(stage, macs, amount)) / 1e12
    return spent


def evaluating(stage: Stage, macs: Macs, amount: Amount) -> float:
    """Captions of the split by beam search, from features that are computed once."""
    steps = 0.0 if stage.kind == "concepts" else macs.prefix + BEAM * (macs.steps + macs.attention)
    return amount.evaluated * (macs.encoder + macs.concepts + steps)


def making(
    stage: Stage, config: LightCapConfig, macs: Macs, models: dict[str, LightCapConfig], sights: dict[str, str], amount: Amount
) -> float:
    """Training, and what it is prepared by. `sights`: whose encoder each stage's captioner has."""
    known, settings = macs.encoder + macs.concepts, stage.config
    passes = getattr(settings, "epochs", 0.0)
    pack = language(config, amount, amount.captions, amount.words)
    asked = language(config, amount, amount.captions, amount.words, probes=True)
    if isinstance(settings, Concepts):
        if not settings.pieces:
            return 0.0
        tuned = settings.encoder == "tuned"
        return amount.images * ((3 * passes if tuned else 1) * macs.encoder + passes * 3 * macs.concepts)
    if isinstance(settings, Train):
        if settings.encoder == "tuned":
            finding = macs.concepts * (4 if settings.concept_weight else 1)
            return amount.images * passes * (3 * macs.encoder + finding + 3 * pack)
        return amount.images * (known + passes * 3 * pack)
    if isinstance(settings, Distill):
        if settings.teachers[0] not in models:  # finished ones, whose own work is not known
            each = len(settings.teachers) if "captions" in settings.match else amount.captions
            seen = passes * ((3 if settings.encoder == "tuned" else 1) * macs.encoder + macs.concepts) if settings.anew else known
            return amount.images * (seen + passes * 3 * language(config, amount, each, amount.words, config.heads))
        taught = [language(models[name], amount, amount.captions, amount.words, probes=True) for name in settings.teachers]
        shown = language(models[settings.teachers[0]], amount, amount.captions, amount.words)
        beside = min(settings.match_epochs, passes) * shown if {"hidden", "attention"} & set(settings.match) else 0.0
        pack = language(config, amount, amount.captions, amount.words, config.heads)
        if settings.anew:
            own = (3 if settings.encoder == "tuned" else 1) * macs.encoder + (4 if settings.concept_weight else 1) * macs.concepts
            named = dict.fromkeys(listened_to(settings))
            others = {sights[name]: count_macs(models[name]).encoder for name in named if sights[name] != sights[stage.name]}
            finding = (1 + bool(settings.concept_weight)) * sum(count_macs(models[name]).concepts for name in named)
            told = sum(language(models[name], amount, amount.captions, amount.words, probes=True) for name in named)
            each = own + sum(others.values()) + finding + 3 * pack + (told if settings.asks_tokens else 0.0)
            return amount.images * (passes * each + beside)
        return amount.images * (known + passes * 3 * pack + beside + (sum(taught) if settings.asks_tokens else 0.0))
    if isinstance(settings, Scst):
        drawn = macs.prefix + (settings.samples + (settings.baseline == "greedy")) * (macs.steps + macs.attention)
        seen = passes if settings.flip or settings.crop else 1.0  # disturbed pictures are encoded in each pass
        return amount.images * (seen * known + passes * (drawn + 3 * language(config, amount, settings.samples, TOKENS, probes=True)))
    if isinstance(settings, Prune):
        each = known + 3 * settings.recover_epochs * language(config, amount, amount.captions, amount.words, config.heads)
        beside = 3 + bool(settings.flip or settings.crop)  # of disturbed pictures the parent's grids are not stored
        each += beside * settings.recover_encoder_epochs * macs.encoder * cuts_encoder(settings)
        each += 4 * settings.recover_concepts_epochs * macs.concepts * moves_concepts(settings)  # the parent's beside it
        return amount.images * (asked + settings.steps * each)
    if isinstance(settings, Quantize):  # trials, of which tuned weights are one, are not counted: there may be none
        tuning = 0.0 if settings.trials else settings.tune_epochs * (known + pack + 3 * (macs.encoder + pack))
        return settings.calibration_images * macs.caption + amount.images * tuning
    return 0.0


def language(
    config: LightCapConfig, amount: Amount, captions: float, words: float, products: int = 1, probes: bool = False
) -> float:
    """MACs of one pass over an image's grid, concepts and captions, with every word predicted by the mean of the heads (in distillation by
    each of them: so many vocabulary `products`). A model of masked pieces predicts those that are masked, or, where it `probes`, each under
    a [MASK] of its own."""
    h, grid = config.hidden, config.grid**2
    text = predicted = captions * (words + 1)
    if config.mask_piece is not None and probes:
        text = 2 * text
    elif config.mask_piece is not None:
        text = captions * (words + 2)
        predicted = captions * min(Masking.most, max(1.0, Masking.share * (words + 1)))
    whole = config.prefix + text
    layer = whole * (4 * h * h + 2 * h * config.ffn) + 2 * h * whole * whole  # what the mask hides is computed, too
    last = whole * 2 * h * h + text * (2 * h * h + 2 * h * config.ffn) + 2 * h * text * whole  # its states of the prefix are not needed
    heads = predicted * (config.heads * h * h + products * h * amount.vocabulary)
    return grid * config.channels * h + (config.layers - 1) * layer + last + heads
