"""Ensemble distillation: teacher i supervises head i (LightCap, section 3.4); hidden states and attention come from the first teacher.

Token distributions are read from targets computed once per teacher, or asked for in each step (`compress.training.lessons`). Hidden states
and attention are compared during the first `match_epochs` epochs, in which the first teacher runs beside the student: the paper's first
phase; tokens are compared throughout. Of finished teachers (`compress.stages.pretrained`) there are the captions that they wrote, and of
BLIP and GIT tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from compress.artifact import Artifact, read_json
from compress.config import Distill
from compress.context import Context
from compress.errors import RecipeError
from compress.training.corpus import UNSEEN_BIAS, Corpus, check_tokenizer, corpus
from compress.training.distillation import Goal, distil, feed_forward
from compress.training.features import device
from compress.training.lessons import Lessons, asked, from_targets, guided, teach
from compress.training.loop import settled
from compress.training.start import continued, new_captioner, read_captioner, write_captioner
from students.lightcap import LightCap
from students.lightcap.bert import copy_layers
from students.lightcap.tokenizer import pieces_of
from teachers.layouts import WRITTEN
from teachers.teacher import load

FOREIGN = "compress.foreign"  # not imported by its name: it is in the lock of the stage that brought the teacher, and what other students'
# stages depend on is not the version of transformers


def run(parent: Artifact | None, config: Distill, context: Context) -> Artifact:
    """Writes the student, taught by the artifacts that `config.teachers` names."""
    seed = context.seed
    sources = [context.artifacts[name] for name in config.teachers]
    if all((source.path / WRITTEN).is_file() for source in sources):
        return of_finished(parent, config, sources, context)
    first, _, settings = read_captioner(sources[0].path)
    student = context.recipe.student
    student = dataclasses.replace(
        student, heads=config.heads or student.heads, ffn=feed_forward(student.ffn, config.ffn_share, first.config.ffn)
    )
    if parent is not None:
        model, tokenizer, settings = continued(parent.path, config.dropout)
        multiply_heads(model, config.heads)
    else:
        weights = student.fusion_weights if config.init == "weights" else None
        modulator = first.config.modulator or 0 if config.modulator is None else config.modulator
        model, tokenizer, _ = new_captioner(
            student, student.preset, weights, context.recipe.data.image_size, config.dropout, seed, first, modulator
        )
        model.config = dataclasses.replace(model.config, mask_piece=first.config.mask_piece)
    known = {name: load(context.artifacts[name].path) for name in dict.fromkeys(config.teachers)}
    for name, teacher in known.items():
        if teacher.vocabulary != tuple(pieces_of(tokenizer)):
            raise RecipeError(f"teacher '{name}': its word pieces are not the student's; name one that was trained with the same "
                              "student.tokenizer, on the same side of a 'vocabulary' stage")
        if config.concept_weight and not torch.equal(teacher.concept_pieces, model.concepts.pieces):
            raise RecipeError(f"teacher '{name}': it finds other concepts than its student; leave out concept_weight, or name one whose "
                              "extractor had the same vocabulary")
    if parent is None and config.init == "teacher":
        others = (None if source in sources[:index] else read_captioner(source.path)[0] for index, source in enumerate(sources) if index)
        start_from(model, [first, *others])  # None of a teacher that is named again
    beside = {piece for teacher in known.values() for piece in teacher.own_pieces()}
    data = corpus(model, tokenizer, settings, context, config.anew, config.flip, config.crop, beside)
    for teacher in known.values():
        teacher.narrow(data.keep)
    teachers = [known[name] for name in config.teachers]
    if config.anew:
        lessons = asked(model, data, teachers, settings, config, context)
    else:
        taught = None
        if config.asks_tokens:
            taught = teach(teachers, sources, data, config.top_k, config.temperature, config.precision, config.teachers, context)
        lessons = from_targets(model, data, taught, teachers[0] if guided(config) else None)
    del first, teacher, teachers, known  # of several, large ones, only those that are asked stay while the student is trained
    return taught_by(lessons, model, tokenizer, settings, data, config, context)


def of_finished(parent: Artifact | None, config: Distill, sources: Sequence[Artifact], context: Context) -> Artifact:
    """The student of finished captioners: of the captions that they wrote of the training images, or of people's; by their tokens, too, if
    it matches them. ModelError for tokens of a captioner with other word pieces than the student's, or of lightcap's own, whose grids are
    of its own encoder."""
    if parent is not None:
        model, tokenizer, settings = continued(parent.path, config.dropout)
        multiply_heads(model, config.heads)
    else:
        student = dataclasses.replace(context.recipe.student, heads=config.heads or context.recipe.student.heads)
        weights = student.fusion_weights if config.init == "weights" else None
        like = read_captioner(context.artifacts[config.extractor].path)[0] if config.extractor else None
        model, tokenizer, settings = new_captioner(
            student, student.preset, weights, context.recipe.data.image_size, config.dropout, context.seed, like, config.modulator
        )
        check_tokenizer(tokenizer, context)
    train, said, taught = context.data.split("train"), None, None
    if "captions" in config.match:
        written = [{item["image"]: item["caption"] for item in read_json(source.path / WRITTEN, list)} for source in sources]
        said = [[texts[example.image_id] for texts in written] for example in train.examples]
    data = corpus(model, tokenizer, settings, context, config.anew, config.flip, config.crop, said=said)
    if config.asks_tokens:
        foreign = importlib.import_module(FOREIGN)
        chosen, pieces = settled(config.precision, device(), context.work, context.share), pieces_of(tokenizer)
        how = chosen, config.top_k, config.temperature, context.cache
        taught = [foreign.targets(source, pieces, train, data, *how, name, context.progress)
                  for name, source in zip(config.teachers, sources, strict=True)]
    return taught_by(from_targets(model, data, taught), model, tokenizer, settings, data, config, context)


def taught_by(
    lessons: Lessons, model: LightCap, tokenizer: Tokenizer, settings: dict, data: Corpus, config: Distill, context: Context
) -> Artifact:
    """Trains and writes `model`, by what its `lessons` tell of `data`."""
    full = model.word.detach().clone()
    model.narrow(data.keep)
    weights = config.token_weight, config.hidden_weight, config.attention_weight, config.concept_weight
    goal = Goal(config.match, config.match_epochs, config.temperature, *weights, config.ensemble)
    steps = data.steps(config.epochs, config.batch_images)
    distil(model, data, lessons, goal, config, steps, context.seed, context.stage.name, context)
    model.widen(data.keep, full, UNSEEN_BIAS)
    if context.share.rank == 0:
        write_captioner(context.output, model, tokenizer, settings)
    return Artifact(context.output)


def multiply_heads(model: LightCap, count: int | None) -> None:
    """A captioner of one head gets `count` copies of it; one that has as many, or of which none are asked, stays as it is."""
    if count in (None, model.config.heads):
        return
    model.heads.branches.extend(copy.deepcopy(model.heads.branches[0]) for _ in range(count - 1))
    model.config = dataclasses.replace(model.config, heads=count)


def start_from(model: LightCap, teachers: Sequence[LightCap | None]) -> None:
    """The first teacher's embeddings and every n-th layer, its modulator, and head i as the (first) head of the i-th of `teachers`; of an
    only one with as many heads, all of them. Heads of none stay as they were drawn: copies of one head, taught alike, would never part.

    RecipeError where their sizes differ.
    """
    first = teachers[0]
    try:
        copy_layers(model.fusion, first.fusion)
        only = len(teachers) == 1 and first.config.heads == model.config.heads
        started = first.heads.branches if only else [teacher and teacher.heads.branches[0] for teacher in teachers]
        for branch, start in zip(model.heads.branches, started, strict=False):
            if start is not None:
                branch.load_state_dict(start.state_dict())
    except (ValueError, RuntimeError) as error:
        what = str(error).splitlines()[-1].strip()
        raise RecipeError(f"the student cannot start from its teachers: {what}; set init: weights") from None
    model.heads.bias.data.copy_(first.heads.bias)
    if model.modulator is not None and model.config.modulator == first.config.modulator:
        model.modulator.load_state_dict(first.modulator.state_dict())
