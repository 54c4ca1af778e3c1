"""Structured pruning to targets in MACs, parameters, megabytes or milliseconds, recovered by distilling from the unpruned parent.

Whole layers leave first, where some shall, and alone where nothing else is asked for. Each step: importance by gate derivatives on training
captions, the cheapest blocks leave until the step's share of the target is met, what is left is repaired without training, the encoder
learns to give its old grid again, its features are computed anew, the concept extractor learns to find there what the parent found, and the
fusion is distilled from the parent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from compress.artifact import Artifact, write_json, writing
from compress.config import Prune
from compress.context import Context
from compress.stages.prune.channels import Block, Unit, units
from compress.stages.prune.importance import importance
from compress.stages.prune.prices import megabytes, shapes_megabytes
from compress.stages.prune.recover import recover_concepts, recover_encoder, recover_fusion
from compress.stages.prune.repair import Repair
from compress.stages.prune.sensitivity import least_layers, measured, sensitivities, with_layers
from compress.stages.prune.target import Target, choose, give_back, ranked
from compress.training.start import read_captioner, write_captioner
from students.lightcap import LightCap
from students.lightcap.dropout import set_dropout

SENSITIVITY = "sensitivity.json"  # part: how far captions' distributions move without half of what can leave there, in nats a piece
TARGET = "target.json"  # `Target.reached`


def run(parent: Artifact, config: Prune, context: Context) -> Artifact:
    """Writes the pruned captioner; its shapes stand in config.json, and what it reached of a target in target.json."""
    seed = context.seed
    model, tokenizer, settings = read_captioner(parent.path)
    set_dropout(model, config.dropout)
    target = Target.of(config, model, parent.bytes() / 1e6 - megabytes(model) + shapes_megabytes(model))
    repair = Repair.of(model, settings, config.parts if target.aims else (), seed, context)
    stay = None
    if config.layers:
        stay = least_layers(*measured(model, tokenizer, settings, seed, context), config.layers)
        model = with_layers(model, stay)
        context.progress.log(f"{context.stage.name}: layers {', '.join(str(index + 1) for index in stay)} stay; {target.describe(model)}")
    moves = factors = taught = good = before = None
    encoder_cut = concepts_moved = False
    whole = units(model, config.parts)
    gated = config.steps > 1 and config.max_drop_cider is not None
    for step in range(1, config.steps + 1):
        label = f"{context.stage.name} {step}/{config.steps}"
        chosen: Sequence[Block] = ()
        if target.aims:
            scores = importance(model, tokenizer, settings, units(model, config.parts, whole), config, seed, context)
            compared = {unit: score for unit, score in scores.items() if config.ratios == "sensitivity" or no_derivative(unit, config)}
            if compared and factors is None:  # measured once, on the unpruned model
                moves, factors = sensitivities(
                    *measured(model, tokenizer, settings, seed, context), compared, config.round_to, target.savings(model), repair,
                    (parent.digest(), stay, seed), context,
                )
            if factors is not None:
                scores = {unit: score * factors.get((unit.kind, unit.name), 1.0) for unit, score in scores.items()}
            note = context.work / f"leaving-{step}.json"
            chosen = leaving(model, scores, config.round_to, target, step / config.steps, note)
        model = repair.without(model, chosen, repair.carried(model))
        context.progress.log(f"{label}: {target.describe(model)}")
        encoder_cut = encoder_cut or any(block.unit.kind == "conv" for block in chosen)
        if encoder_cut:
            recover_encoder(model, parent, settings, config, seed, f"{label} encoder", context)
        concepts_moved = concepts_moved or any(block.unit.kind in ("conv", "concept") for block in chosen)
        if concepts_moved and model.concepts is not None:
            recover_concepts(model, parent, settings, config, seed, f"{label} concepts", context)
        if config.recover_epochs:
            taught = recover_fusion(model, parent, tokenizer, settings, taught, config, seed + step, f"{label} fusion", context)
        if gated:
            before = context.ciders(context.artifacts.get(context.stage.against, parent)) if before is None else before
            made = written(context.work / f"step-{step}", model, tokenizer, settings)
            drop = float((before - context.ciders(made)).mean())
            context.progress.log(f"{label}: CIDEr {-drop:+.2f}, max_drop_cider {config.max_drop_cider:g}")
            if drop > config.max_drop_cider:
                if good is not None:
                    context.progress.log(f"{label}: taken back, so the target is not reached")
                    model, _, _ = read_captioner(good.path)
                    step -= 1
                break
            good = made
    write_captioner(context.output, model, tokenizer, settings)
    if target.aims:
        write_json(context.output / TARGET, target.reached(model, step, config.steps))
    if config.ratios == "sensitivity" and moves is not None:
        write_json(context.output / SENSITIVITY, moves)
    return Artifact(context.output)


def no_derivative(unit: Unit, config: Prune) -> bool:
    """Whether the level of the unit's importance has to be measured."""
    return unit.kind == "concept" and config.importance != "magnitude"


def leaving(
    model: LightCap, scores: Mapping[Unit, Tensor], round_to: int, target: Target, share: float, note: Path
) -> Sequence[Block]:
    """The blocks that leave so that the target is met after `share` of the way; none where it is met already. They are
    kept in `note`: asked again after a stop, a clock would choose others, and so may a GPU, whose sums differ in their last bits."""
    if note.exists():
        known = {(unit.kind, unit.name): unit for unit in scores}
        return [Block(known[kind, name], tuple(gone), 0.0) for kind, name, gone in json.loads(note.read_text())]
    chosen: Sequence[Block] = []
    if target.missed(model, share):
        order = ranked(model, scores, round_to, target, share)
        chosen = order[: choose(model, order, target, share)]
    if target.exact:
        chosen = give_back(model, chosen, target, share)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, [[block.unit.kind, block.unit.name, block.channels] for block in chosen])
    return chosen


def written(folder: Path, model: LightCap, tokenizer: Tokenizer, settings: dict) -> Artifact:
    """`model` as it is after a step; after a stop, the same again."""
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder) as output:
        write_captioner(output, model, tokenizer, settings)
    return Artifact(folder)
