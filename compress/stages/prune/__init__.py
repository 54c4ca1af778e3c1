"""Structured pruning to a target in MACs, parameters or megabytes, recovered by distilling from the unpruned parent.

Each step: importance by gate derivatives on training captions, the cheapest blocks leave until the step's share of the target is met,
the encoder learns to give its old grid again, its features are computed anew, and the fusion is distilled from the parent.
"""

from __future__ import annotations

from compress.artifact import Artifact
from compress.config import Prune
from compress.context import Context
from compress.stages.prune.channels import blocks, remove, units
from compress.stages.prune.importance import importance
from compress.stages.prune.recover import recover_encoder
from compress.stages.prune.target import Target, choose, give_back
from compress.training.corpus import UNSEEN_BIAS, corpus
from compress.training.distillation import Goal, distil, teach
from compress.training.start import read_captioner, write_captioner
from students.lightcap.dropout import set_dropout
from teachers.teacher import load


def run(parent: Artifact, config: Prune, context: Context) -> None:
    """Writes the pruned captioner; its shapes stand in config.json."""
    seed = context.seed if config.seed is None else config.seed
    model, tokenizer, settings = read_captioner(parent.path)
    set_dropout(model, config.dropout)
    full = model.word.detach().clone()
    target = Target.of(config, model)
    teacher = load(parent.path)
    taught = None
    for step in range(1, config.steps + 1):
        label = f"{context.stage.name} {step}/{config.steps}"
        scores = importance(model, tokenizer, settings, units(model, config.parts), config, seed, context)
        order = blocks(scores, config.round_to, target.savings)
        wanted = target.at(step / config.steps)
        chosen = order[: choose(model, order, wanted, target)]
        model = remove(model, give_back(model, chosen, wanted, target))
        context.progress.log(f"{label}: {target.describe(model)}")
        if "encoder" in config.parts:
            recover_encoder(model, parent, settings, config, seed, f"{label} encoder", context)
        data = corpus(model, tokenizer, settings, context)
        if taught is None:
            teacher.narrow(data.keep)
            taught = teach_from_parent(parent, teacher, tokenizer, settings, data, config, context)
        if config.recover_epochs:
            model.narrow(data.keep)
            goal = Goal(("tokens",), 0.0, config.temperature, config.token_weight, 0.0, 0.0)
            steps = data.steps(config.recover_epochs, config.batch_images)
            distil(model, data, taught, None, goal, config, steps, seed + step, f"{label} fusion", context)
            model.widen(data.keep, full, UNSEEN_BIAS)
    write_captioner(context.output, model, tokenizer, settings)


def teach_from_parent(parent, teacher, tokenizer, settings, data, config, context):
    """The parent's token distributions, over its own features: the pruned encoder's are the student's business alone."""
    own, _, _ = read_captioner(parent.path)
    seen = corpus(own, tokenizer, settings, context)
    return teach([teacher], [parent], seen, config.top_k, config.temperature, [parent.path.name[:8]], context)
