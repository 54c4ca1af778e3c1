"""Keys of a stage that contradict each other, and many that would change nothing: found when a recipe is read, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.config import Average, Concepts, Distill, Encoding, Pretrained, Prune, Quantize, Scst, Train

TARGETS = ("macs", "params", "mb", "ms")


def cuts_encoder(config: Prune) -> bool:
    """Whether channels of the encoder may leave: not where nothing but layers of the fusion shall."""
    return "encoder" in config.parts and any(getattr(config, key) is not None for key in TARGETS)


def moves_concepts(config: Prune) -> bool:
    """Whether an extractor may find others: its own channels may leave, or the encoder's."""
    return bool({"concepts", "encoder"} & set(config.parts)) and any(getattr(config, key) is not None for key in TARGETS)


def conflicts(config, parent: str | None) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of a stage's settings; `parent` is the stage that it goes on from, None where it starts anew."""
    find = FINDERS.get(type(config))
    return iter(()) if find is None else find(config, parent)


def _pretrained(config: Pretrained, parent: str | None) -> Iterator[tuple[str, str]]:
    if not config.model:
        yield "model", "'pretrained' is a finished captioner: name its folder, or OWNER/NAME on the hub (model: NAME)"


def _concepts(config: Concepts, parent: str | None) -> Iterator[tuple[str, str]]:
    if config.pieces == 0 and parent is None:
        yield "pieces", "0 takes an extractor away, and a new captioner has none; name the stage that has one (from: NAME)"
    if config.pieces == 0 and config.encoder == "tuned":
        yield "encoder", "is not trained where the extractor is taken away (pieces: 0): leave it out"
    if config.boxes and not config.image_sizes:
        yield "boxes", "are in pixels: give the pictures' sizes, too (image_sizes: COCO's JSON or Visual Genome's image_data.json)"
    if config.image_sizes and not (config.regions or config.boxes):
        yield "image_sizes", "are of pictures with regions or boxes, and there are none: leave it out"
    if config.region_weight != Concepts.region_weight and not config.regions:
        yield "region_weight", "is of labelled regions: name their file (regions: FILE), or leave it out"
    for key in ("regions", "boxes"):
        if getattr(config, key) and (config.flip or config.crop):
            yield key, "are places in pictures as they are, which flip and crop move: leave either these or those out"
    yield from _of_tuned_encoder(config)
    yield from _of_encoded_pictures(config)


def _train(config: Train, parent: str | None) -> Iterator[tuple[str, str]]:
    if parent is not None:
        for key in ("fusion_weights", "modulator"):
            if getattr(config, key) is not None:
                yield key, f"is of a new captioner, but this stage goes on from '{parent}'; leave it out"
        if config.zero_layers:
            yield "zero_layers", f"are of a new captioner, but this stage goes on from '{parent}'; leave it out"
    elif not config.extractor:
        if config.modulator:
            yield "modulator", "is steered by concepts, but this captioner reads none (extractor: NAME gives it some)"
        if config.matching_weight:
            yield "matching_weight", "is of replaced concepts, but this captioner reads none (extractor: NAME gives it some)"
        if config.concept_weight:
            yield "concept_weight", "is of finding concepts, but this captioner reads none (extractor: NAME gives it some)"
    yield from _of_tuned_encoder(config)
    yield from _of_encoded_pictures(config)


def _of_encoded_pictures(config: Encoding) -> Iterator[tuple[str, str]]:
    for key in ("flip", "crop"):
        if getattr(config, key) and config.encoder != "tuned":
            yield key, ("disturbs pictures while the encoder is trained; a frozen one's features are computed once: set encoder: tuned, or "
                        "leave it out")


def _of_tuned_encoder(config: Encoding) -> Iterator[tuple[str, str]]:
    if config.encoder == "tuned":
        return
    for key, what in (
        ("word_weight", "is of a classifier that trains the encoder"),
        ("concept_weight", "is of an extractor that is trained with the encoder"),
    ):
        if getattr(config, key, None):
            yield key, f"{what}: set encoder: tuned, or leave it out"
    if config.encoder_learning_rate != Encoding.encoder_learning_rate:
        yield "encoder_learning_rate", "is of a tuned encoder: set encoder: tuned, or leave it out"


def _distill(config: Distill, parent: str | None) -> Iterator[tuple[str, str]]:
    if not config.match:
        yield "match", "nothing is learned; name at least one of tokens, hidden, attention, captions"
    if config.modulator is not None and parent is not None:
        yield "modulator", f"is of a new student, but this stage goes on from '{parent}'; leave it out"
    if config.ffn_share and parent is not None:
        yield "ffn_share", f"is of a new student, but this stage goes on from '{parent}'; leave it out"
    elif config.ffn_share and config.init != "teacher":
        yield "ffn_share", f"narrows the first teacher's layers, but this student starts otherwise (init: {config.init}): set init: teacher"
    if config.init != Distill.init and parent is not None:
        yield "init", f"is of a new student, but this stage goes on from '{parent}'; leave it out"
    if config.ensemble == "all" and len(config.teachers) == 1:
        yield "ensemble", "all is of several teachers; leave it out with one"
    if config.ensemble != "each" and "tokens" not in config.match:
        yield "ensemble", f"{config.ensemble} is of heads that match tokens; add tokens to 'match', or leave it out"
    if config.match_epochs != Distill.match_epochs and not {"hidden", "attention"} & set(config.match):
        yield "match_epochs", "is of hidden states and attention; add them to 'match', or leave it out"
    if "tokens" not in config.match:
        for key in ("token_weight", "temperature", "top_k"):
            if getattr(config, key) != getattr(Distill, key):
                yield key, "is of matching tokens; add tokens to 'match', or leave it out"
    yield from _of_tuned_encoder(config)
    for of in ("hidden", "attention"):
        if getattr(config, f"{of}_weight") != getattr(Distill, f"{of}_weight") and of not in config.match:
            yield f"{of}_weight", f"is of matching {of}; add {of} to 'match', or leave it out"


def against_teachers(config: Distill, teachers: Sequence[str], others: Sequence[str], new: bool) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) where `others` of the `teachers` came finished; `new`: of a new student."""
    own = next((name for name in teachers if name not in others), None)
    if others and own:
        yield "teachers", f"'{own}' was trained here and '{others[0]}' came finished (pretrained): a student has teachers of one kind"
    if own and "captions" in config.match:
        yield "match", f"captions are what pretrained teachers wrote, and '{own}' was trained here: match tokens, hidden or attention"
    if others and not set(config.match) <= {"captions", "tokens"}:
        yield "match", f"of '{others[0]}' there are captions, and tokens of BLIP and GIT (pretrained): match: [captions, tokens], or one"
    for key in ("ffn_share", "hidden_weight", "attention_weight", "concept_weight", "match_epochs"):
        if others and getattr(config, key) != getattr(Distill, key):
            part = "extractor" if key == "concept_weight" else "layers"
            yield key, f"is of a teacher's {part}, and of '{others[0]}' none are seen (pretrained): leave it out"
    for key in ("flip", "crop"):
        if others and config.asks_tokens and getattr(config, key):
            yield key, f"disturbs pictures, and what '{others[0]}' says is of pictures as they are (pretrained): match captions alone"
    if others and new and config.init == "teacher":
        yield "init", f"of '{others[0]}' no layers are taken (pretrained): set init: weights, or random"
    if config.extractor is not None and not others:
        yield "extractor", "is of pretrained teachers; this student takes image encoder and concepts of its first teacher: leave it out"


def _scst(config: Scst, parent: str | None) -> Iterator[tuple[str, str]]:
    if config.draw == "beams" and config.temperature != Scst.temperature:
        yield "temperature", "is of captions drawn by chance; draw: beams takes the best, so leave it out"


def _average(config: Average, parent: str | None) -> Iterator[tuple[str, str]]:
    if not config.others:
        yield "others", "'average' needs other stages, to be averaged with the one that it works on (others: [NAME, ...])"
    names = [parent, *config.others]
    if twice := next((name for name in names if names.count(name) > 1), None):
        what = "is the stage that this one works on, and" if twice == parent else "stands there twice, and"
        yield "others", f"'{twice}' {what} would count twice; name each once"


def _prune(config: Prune, parent: str | None) -> Iterator[tuple[str, str]]:
    if all(getattr(config, key) is None for key in (*TARGETS, "layers")):
        yield TARGETS[0], "'prune' needs a target: macs, params (shares of its parent), mb, ms or layers"
    elif config.steps > 1 and all(getattr(config, key) is None for key in TARGETS):
        yield "steps", "lead to a target (macs, params, mb, ms); layers leave at once: leave it out"
    if config.epochs != Prune.epochs:
        yield "epochs", "are of training; say how long the pruned model recovers (recover_epochs, recover_encoder_epochs)"
    if not config.parts:
        yield "parts", "nothing may leave; name at least one of encoder, fusion, concepts, hidden"
    if config.layers and "fusion" not in config.parts:
        yield "layers", "are of the fusion; add fusion to 'parts', or leave it out"
    if not cuts_encoder(config) or not config.recover_encoder_epochs:
        for key in ("flip", "crop"):
            if getattr(config, key):
                yield key, "disturbs pictures while the encoder recovers; here it does not (parts, recover_encoder_epochs): leave it out"


def _quantize(config: Quantize, parent: str | None) -> Iterator[tuple[str, str]]:
    if config.trials and config.max_drop_cider is None:
        yield "trials", "there is nothing to try for without 'max_drop_cider'"
    if not config.tune_epochs and config.tune_learning_rate != Quantize.tune_learning_rate:
        yield "tune_learning_rate", "nothing is tuned without 'tune_epochs'"


FINDERS = {Pretrained: _pretrained, Concepts: _concepts, Train: _train, Distill: _distill, Scst: _scst, Average: _average, Prune: _prune,
           Quantize: _quantize}
