"""The concept extractor's training (LightCap, section 3.1): the alignment MLP learns to bring regions of the grid to the text embeddings of
what they show; the image encoder with it, if it is tuned.

Where there are labelled regions, each is classified among all concepts. What the captions of a picture mention is learned from the picture
as a whole: some of its windows, or of a detector's boxes, should find it (multiple-instance learning), and this alone is enough where
nothing is labelled. A captioner looks at windows, which need no detector beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.config import Concepts
from compress.context import Context
from compress.data import CaptionSet
from compress.data.concepts import default_text_encoder, is_action, read_concepts
from compress.data.regions import Region, Regions, read_boxes, read_regions, read_sizes
from compress.errors import DataError, RecipeError
from compress.training.batches import image_batches, steps_of
from compress.training.corpus import check_tokenizer, grids_of
from compress.training.features import device
from compress.training.loop import Group, fit
from compress.training.mentions import concept_loss, mentioned
from compress.training.start import new_captioner, read_captioner, ready, write_captioner
from compress.training.text import embed_texts
from students.lightcap import LightCap
from students.lightcap.concepts import NONE, boxes_on_grid
from students.lightcap.norms import folded


def run(parent: Artifact | None, config: Concepts, context: Context) -> Artifact:
    """Writes the parent (or a new captioner of the preset, whose language part is untrained) with a trained concept extractor."""
    if not config.pieces:
        return take_away(parent, context)
    seed = context.seed
    student = context.recipe.student
    names = read_concepts(config.vocabulary)
    if parent is None:
        name = config.preset or student.preset
        weights = student.fusion_weights if name == student.preset else None  # for the captioner that goes on from it
        model, tokenizer, settings = new_captioner(student, name, weights, context.recipe.data.image_size, 0.0, seed, extracts=True)
        check_tokenizer(tokenizer, context)
    else:
        model, tokenizer, settings = read_captioner(parent.path)
    data = context.data.split("train")
    wanted = mentioned(data, names)
    if not wanted.any():
        raise DataError("no training caption mentions a concept of the list; give another (vocabulary: FILE, a concept a line)")
    text_encoder = config.text_encoder or default_text_encoder(model.config.encoder)
    pieces = spelled(names, tokenizer)
    if int((pieces != NONE).sum()) < config.pieces:
        raise RecipeError(f"{len(names)} concepts do not fill {config.pieces} word pieces; set pieces to less, or give more concepts")
    torch.manual_seed(seed)
    model.start_concepts(embed_texts([sentence(name) for name in names], text_encoder), pieces, prior(wanted), config.inner, config.pieces)
    labels = labelled(config, data, names, model.config.grid)
    boxes = detected(config, data, model.config.grid)
    tuned = config.encoder == "tuned"
    grid_of = grids_of(model, data, settings, context, tuned, config.flip, config.crop)
    where = device()
    model.to(where)
    ready(model.encoder, tuned, context.recipe.student)
    model.requires_grad_(False)
    wanted = wanted.to(where).float()
    rows_of = image_batches(len(data), config.batch_images, seed)

    def loss_of(step: int) -> Tensor:
        batch = rows_of(step)
        rows = context.share.of(batch)
        grid = F.dropout(grid_of(model, rows), config.dropout)
        scores = scores_of(model, grid, [boxes.get(int(row)) for row in rows])
        loss = concept_loss(scores, wanted[rows])
        if weight := context.share.weight(batch, lambda row: len(labels[row][1]) if row in labels else 0):
            loss = loss + config.region_weight * weight * region_loss(model, grid, [labels.get(int(row)) for row in rows])
        return loss

    trained = nn.ModuleDict({"alignment": model.alignment.requires_grad_(True)})
    groups = [Group(list(model.alignment.parameters()), config.learning_rate)]
    if tuned:
        trained["encoder"] = model.encoder.requires_grad_(True)
        groups.append(Group(list(model.encoder.parameters()), config.encoder_learning_rate))
    steps = steps_of(len(data), config.epochs, config.batch_images)
    with folded(model.encoder, model.config.image_size):
        fit(trained, groups, steps, loss_of, config, seed, context.work, context.stage.name, context.progress, context.share)
    model.cpu().eval().requires_grad_(True)
    if context.share.rank == 0:
        write_captioner(context.output, model, tokenizer, settings)
    return Artifact(context.output)


def take_away(parent: Artifact, context: Context) -> Artifact:
    """Writes the parent without a concept extractor and without what reads concepts: for captioners that share its encoder alone."""
    model, tokenizer, settings = read_captioner(parent.path)
    model.alignment = model.concepts = model.modulator = None
    model.config = dataclasses.replace(model.config, concepts=0, alignment=None, concept_vocabulary=None, modulator=None)
    write_captioner(context.output, model, tokenizer, settings)
    return Artifact(context.output)


def sentence(concept: str) -> str:
    return f"a photo of someone {concept}" if is_action(concept) else f"a photo of a {concept}"


def spelled(names: tuple[str, ...], tokenizer: Tokenizer) -> Tensor:
    """(count, longest) word pieces, padded with NONE."""
    ids = [item.ids for item in tokenizer.encode_batch(list(names), add_special_tokens=False)]
    longest = max(map(len, ids))
    return torch.tensor([[*row, *[NONE] * (longest - len(row))] for row in ids])


def prior(wanted: Tensor) -> Tensor:
    """(count,) log-odds of a concept in a training picture; one that none mentions has those of half a picture."""
    share = wanted.float().mean(0)
    least = 0.5 / len(wanted)
    return torch.logit(share.clamp(least, 1 - least))


def labelled(config: Concepts, data: CaptionSet, names: tuple[str, ...], side: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Pooling weights (R, side * side) and concepts (R,) of each training picture that has labelled regions, by its number."""
    if not config.regions:
        return {}
    found = of_pictures(data, ", ".join(config.regions), "regions", read_regions(config.regions, names, config.image_sizes))
    return {row: (pooled(regions, side), torch.tensor([region.concept for region in regions])) for row, regions in found.items()}


def detected(config: Concepts, data: CaptionSet, side: int) -> dict[int, Tensor]:
    """Pooling weights (R + 1, side * side) of a detector's boxes and of the whole grid, of each training picture that has boxes, by its
    number."""
    if config.boxes is None:
        return {}
    found = of_pictures(data, config.boxes, "boxes", read_boxes(config.boxes, read_sizes(config.image_sizes)))
    whole = Region((0.0, 0.0, 1.0, 1.0), None, 1.0)
    return {row: pooled((*regions, whole), side) for row, regions in found.items()}


def of_pictures(data: CaptionSet, file: str, what: str, found: Regions) -> dict[int, tuple[Region, ...]]:
    """The regions that `file` has, by the number of their training picture. DataError where they are of none."""
    rows = {row: regions for row, example in enumerate(data.examples) if (regions := found.of_image(example.image_id))}
    if not rows:
        why = f"their keys are {', '.join(sorted(found)[:3])}, ..." if found else "none has an area within its picture and a concept's name"
        raise DataError(f"{file}: its {what} are of no training picture ({why})")
    return rows


def pooled(regions: Sequence[Region], side: int) -> Tensor:
    return boxes_on_grid(torch.tensor([region.box for region in regions]), side)


def scores_of(model: LightCap, grid: Tensor, boxes: list[Tensor | None]) -> Tensor:
    """Log-odds (B, count) of each concept in grid (B, G, channels), by the boxes of each picture, or by windows where it has none."""
    if not any(box is not None for box in boxes):
        return model.concept_scores(grid)
    one_by_one = zip(grid.split(1), boxes, strict=True)
    return torch.cat([model.concept_scores(row, None if box is None else box.to(grid.device)) for row, box in one_by_one])


def region_loss(model: LightCap, grid: Tensor, labels: list[tuple[Tensor, Tensor] | None]) -> Tensor:
    """The mean cross-entropy of the labelled regions of a batch, grid (B, G, channels), over all concepts."""
    logits, targets = [], []
    for row, label in zip(grid, labels, strict=True):
        if label is not None:
            regions = model.alignment(row.unsqueeze(0), label[0].to(grid.device))
            logits.append(regions[0] @ model.concepts.matrix.t() + model.concepts.prior)
            targets.append(label[1].to(grid.device))
    return F.cross_entropy(torch.cat(logits), torch.cat(targets))
