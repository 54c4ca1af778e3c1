"""The architecture of what each stage of a recipe makes, known before any has run; and what a stage asks of one that it cannot have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from compress.config import Average, Concepts, Distill, Encoding, Prune, Recipe, Stage, Train, Vocabulary, references
from compress.conflicts import cuts_encoder
from compress.data.concepts import default_text_encoder
from compress.errors import RecipeError
from compress.training.distillation import feed_forward
from compress.training.start import captioner_config
from students.lightcap import LightCapConfig
from students.lightcap.config import PREFIX_POSITION, SizeError

MASK = 0  # stands for the id of [MASK], which the tokenizer knows


def architectures(recipe: Recipe, vocabulary: int) -> tuple[dict[str, LightCapConfig], dict[str, str]]:
    """By name of the stage, with `vocabulary` word pieces; of a captioner that others made, none. Pruned shapes are not known before: they
    are the parent's. And the stage that last changed its encoder ("" where none has): stages of the same have the same encoder.

    RecipeError, with the line of the key or of the stage, for sizes that no captioner can have and for settings that do not fit its parent
    or teachers.
    """
    models: dict[str, LightCapConfig] = {}
    encoders: dict[str, str] = {}
    narrowed: dict[str, bool] = {}
    for stage in recipe.stages:
        if stage.kind == "pretrained":
            continue
        try:
            models[stage.name] = _architecture(recipe, stage, models, vocabulary)
            encoders[stage.name] = _encoder(recipe, stage, encoders)
            narrowed[stage.name] = _narrowed(stage, models, narrowed)
        except SizeError as error:
            named = ((key, f"{section}.{key}") for section in ("student", "data") for key in error.keys)
            place = next((f"{recipe.places[at]}key '{key}', " for key, at in named if at in recipe.places), stage.place)
            raise RecipeError(f"{place}stage '{stage.name}': {error}") from None
        except ValueError as error:
            raise RecipeError(f"{stage.place}stage '{stage.name}': {error}") from None
    return models, encoders


def _architecture(recipe: Recipe, stage: Stage, models: Mapping[str, LightCapConfig], vocabulary: int) -> LightCapConfig:
    config = stage.config
    parent = models.get(stage.parent)
    if isinstance(config, Distill):
        model = _student(recipe, config, parent, models, vocabulary)
        _check_heads(config, model.heads)
        if config.concept_weight:
            _check_concepts(config, model, models)
        if config.teachers[0] in models:
            _check_states(config, model, models[config.teachers[0]])
    elif parent is None:
        like = models.get(getattr(config, "extractor", None))
        name = getattr(config, "preset", None) or recipe.student.preset
        extracts = isinstance(config, Concepts)
        sizes = recipe.data.image_size, 0.0, vocabulary
        model = captioner_config(recipe.student, name, *sizes, like, getattr(config, "modulator", None), extracts)
        if getattr(config, "objective", None) == "masked":
            model = dataclasses.replace(model, mask_piece=MASK)
        if isinstance(config, Train):
            _check_reads(config, model)
            if config.zero_layers > model.layers:
                raise ValueError(f"zero_layers: {config.zero_layers} of {model.layers}; name no more than there are")
    else:
        model = parent
        if isinstance(config, Train):
            _check_onward(config, model)
    for other in getattr(config, "others", ()):
        if models[other] != parent:
            raise ValueError(f"'{other}' is not built as '{stage.parent}' is: a mean of their weights would mean nothing")
    if isinstance(config, Prune) and set(config.parts) == {"concepts"} and not model.concepts:
        raise ValueError("parts: only concepts are to be pruned, but the captioner reads none; name encoder, fusion, or both")
    if isinstance(config, Prune) and config.layers:
        if config.layers >= model.layers:
            raise ValueError(f"layers: {config.layers} shall stay of {model.layers}; name less, or leave it out")
        model = dataclasses.replace(model, layers=config.layers)
    if isinstance(config, Concepts) and not config.pieces:
        model = dataclasses.replace(model, concepts=0, alignment=None, modulator=None)
    elif isinstance(config, Concepts):
        text = 384 if (config.text_encoder or default_text_encoder(model.encoder)) == "minilm" else 1024
        model = dataclasses.replace(model, concepts=config.pieces, alignment=(config.inner, text))
    if model.positions < (needed := PREFIX_POSITION + model.prefix):
        most = model.positions - PREFIX_POSITION - model.grid**2
        raise ValueError(f"{model.concepts} pieces of concepts need {needed} positions, and there are {model.positions}: {most} fit")
    return model


def _encoder(recipe: Recipe, stage: Stage, encoders: Mapping[str, str]) -> str:
    """The stage that last changed the encoder of what `stage` makes; "" where that is still the pretrained one. ValueError for a teacher
    that would read the grid of another encoder than its own, its student's."""
    config = stage.config
    if isinstance(config, Distill) and config.teachers[0] in encoders:
        first = stage.parent or config.teachers[0]
        for teacher in config.teachers:
            if not config.anew and encoders[teacher] != encoders[first]:
                own, other = (f"that of '{encoders[name]}'" if encoders[name] else "the pretrained one" for name in (first, teacher))
                raise ValueError(f"teacher '{teacher}' would read grids of another encoder, {own}, than its own, {other}; name teachers "
                                 "that share their student's encoder, or have each see for itself (flip, crop, or encoder: tuned)")
        return stage.name if config.encoder == "tuned" else encoders[first]
    changes = (isinstance(config, Encoding) and config.encoder == "tuned") or (isinstance(config, Prune) and cuts_encoder(config))
    averaged = isinstance(config, Average) and {encoders[name] for name in config.others} != {encoders[stage.parent]}
    if changes or averaged:
        return stage.name
    if stage.parent or getattr(config, "extractor", None):
        return encoders[stage.parent or config.extractor]
    return stage.name if recipe.student.encoder_weights in (None, "none") else ""


def _narrowed(stage: Stage, models: Mapping[str, LightCapConfig], narrowed: Mapping[str, bool]) -> bool:
    """Whether a `vocabulary` stage has cut the word pieces of what `stage` makes. ValueError where it would take concepts, which are word
    pieces, or a teacher's tokens from a captioner of others."""
    own = isinstance(stage.config, Vocabulary) or (stage.parent is not None and narrowed[stage.parent])
    for name in references(stage.config):
        if name not in models:
            continue
        takes = name != getattr(stage.config, "extractor", None) or models[name].concepts  # of one without concepts, the encoder alone
        if narrowed[name] != own and takes:
            which = "cut by a 'vocabulary' stage, and its own are not" if narrowed[name] else "whole, and its own are cut ('vocabulary')"
            raise ValueError(f"the word pieces of '{name}' are {which}; name a stage on the same side of it")
    return own


def _student(
    recipe: Recipe, config: Distill, parent: LightCapConfig | None, models: Mapping[str, LightCapConfig], vocabulary: int
) -> LightCapConfig:
    if parent is None and config.teachers[0] not in models:  # finished ones
        student = dataclasses.replace(recipe.student, heads=config.heads or recipe.student.heads)
        like, modulator = models.get(config.extractor), config.modulator
        if modulator and (like is None or not like.concepts):
            raise ValueError("a modulator is steered by concepts, but this student reads none (extractor: NAME gives it some)")
        return captioner_config(student, student.preset, recipe.data.image_size, 0.0, vocabulary, like, modulator)
    if parent is None:
        teacher = models[config.teachers[0]]
        ffn = feed_forward(recipe.student.ffn, config.ffn_share, teacher.ffn)
        student = dataclasses.replace(recipe.student, heads=config.heads or recipe.student.heads, ffn=ffn)
        sizes = recipe.data.image_size, 0.0, vocabulary
        modulator = teacher.modulator or 0 if config.modulator is None else config.modulator
        if modulator and not teacher.concepts:
            raise ValueError("a modulator is steered by concepts, but the teacher reads none")
        made = captioner_config(student, student.preset, *sizes, teacher, modulator)
        if config.init == "teacher":
            _check_start(made, teacher)
            for name in config.teachers[1 : made.heads]:
                if models[name].hidden != made.hidden:
                    raise ValueError(f"a head of hidden size {made.hidden} cannot start from that of '{name}', of {models[name].hidden}; "
                                     "set init: weights")
        return dataclasses.replace(made, mask_piece=teacher.mask_piece)
    if config.heads in (None, parent.heads):
        return parent
    if parent.heads != 1:
        raise ValueError(f"heads: {config.heads} asked of a captioner that has {parent.heads}; only one that has 1 can get more")
    if len(config.teachers) > 1 and not config.asks_tokens:
        raise ValueError(f"heads: {config.heads} copies of one head, which match no tokens, stay equal; let them match some")
    if len(config.teachers) == 1 or (config.ensemble == "each" and len(set(config.teachers)) == 1):
        raise ValueError(f"heads: {config.heads} copies of one head, taught by one teacher, stay equal; name a teacher for each")
    if config.ensemble == "all":
        raise ValueError(f"heads: {config.heads} copies of one head, taught by all teachers, stay equal; start anew, or leave out ensemble")
    return dataclasses.replace(parent, heads=config.heads)


def _check_start(student: LightCapConfig, teacher: LightCapConfig) -> None:
    """ValueError for a new student that cannot take its first teacher's layers: known before the teacher has been trained for hours."""
    for what, own, other, fits in (
        ("hidden size", student.hidden, teacher.hidden, student.hidden == teacher.hidden),
        ("feed-forward width", student.ffn, teacher.ffn, student.ffn <= teacher.ffn),  # a narrower one keeps the strongest neurons
        ("number of attention heads", student.attention_heads, teacher.attention_heads, student.attention_heads == teacher.attention_heads),
        ("number of positions", student.positions, teacher.positions, student.positions == teacher.positions),
    ):
        if not fits:
            raise ValueError(f"a student of {what} {own} cannot start from a teacher of {other}; set init: weights")


def _check_heads(config: Distill, heads: int) -> None:
    if len(config.teachers) not in (1, heads):
        raise ValueError(f"{len(config.teachers)} teachers for {heads} heads; name one, or one per head")
    if config.ensemble != "each" and heads == 1:
        raise ValueError(f"ensemble: {config.ensemble} is of several heads; leave it out here")


def _check_states(config: Distill, model: LightCapConfig, teacher: LightCapConfig) -> None:
    if {"hidden", "attention"} & set(config.match) and (model.mask_piece is None) != (teacher.mask_piece is None):
        one, other = ("causal" if each.mask_piece is None else "masked" for each in (model, teacher))
        raise ValueError(f"match: hidden states and attention of a {one} student and a {other} teacher are of other places; match tokens")
    if "attention" in config.match and model.prefix != teacher.prefix:
        raise ValueError(f"match: attention is over prefixes of {model.prefix} tokens here and of {teacher.prefix} in the first teacher; "
                         "take attention out of 'match', or give both the same concepts")


def _check_concepts(config: Distill, model: LightCapConfig, models: Mapping[str, LightCapConfig]) -> None:
    blind = ["the student"] * (not model.concepts) + [f"teacher '{name}'" for name in config.teachers if not models[name].concepts]
    if blind:
        raise ValueError(f"concept_weight is of finding concepts, but {blind[0]} finds none: leave it out")


def _check_onward(config: Train, model: LightCapConfig) -> None:
    own = "causal" if model.mask_piece is None else "masked"
    if config.objective not in (None, own):
        raise ValueError(f"the captioner that this stage goes on from is {own}; a new one (preset: NAME) can be {config.objective}")
    _check_reads(config, model)


def _check_reads(config: Train, model: LightCapConfig) -> None:
    for key in ("matching_weight", "concept_weight", "modulator"):
        if getattr(config, key) and not model.concepts:
            raise ValueError(f"{key} is of concepts, but this captioner reads none")
