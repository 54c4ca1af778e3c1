"""A ledger row's numbers: what a captioner says of a split, how good that is, what it costs, and how it differs from its parent."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from compress import metrics, runtime
from compress.artifact import Artifact, read_json, write_json
from compress.conflicts import cuts_encoder
from compress.context import Context, Progress
from compress.cost import costs
from compress.data import CaptionSet
from compress.data.concepts import read_concepts
from compress.decode import Special, beam_search
from compress.errors import ModelError, StageError
from compress.latency import TIMED_IMAGES, latency
from compress.ledger import captions_file
from compress.metrics.bootstrap import paired
from compress.process import thread_count
from compress.training.corpus import UNSEEN_BIAS
from compress.training.features import device, grids, pixels
from compress.training.mentions import mentioned, precision_recall
from compress.training.start import read_captioner
from students.lightcap import LightCap
from students.lightcap.tokenizer import decode_caption

BEAM = 5  # for accuracy
BATCH = 32
VARIED = 10  # different captions
UNTRAINED = ("vocabulary", "prune", "quantize", "export")  # stages that train nothing but to recover
MENDS = {"quantize": "more calibration_images, or trials", "prune": "more steps, or a lower encoder_learning_rate"}


def measure(artifact: Artifact, against: Artifact | None, context: Context) -> dict:
    """The ledger row of `artifact` on the recipe's val split, beam 5; compared with `against`."""
    if context.stage.kind == "concepts":
        return extraction(artifact, context)
    split = context.recipe.data.val_split
    parent = context.artifacts.get(context.stage.parent, against)  # of a student without one, its teacher
    against, parent = (  # none that is a concept extractor, which says nothing yet
        one if one is not None and captions_file(one.path, split).is_file() else None for one in (against, parent)
    )
    if parent is not None and (parent.foreign or (parent.graphs and not artifact.graphs)):
        parent = None  # a teacher that came finished, which another runtime runs
    data = context.data.split(split)
    said, scores = scored(artifact, data, context.cache, context.progress)
    if broken := senseless(data, said):
        raise StageError(f"the log-probabilities of {len(broken)} captions, the first of {broken[0]}, are not finite; lower learning_rate")
    spoken = written_down(artifact, data, said, scores)
    row = accuracy(scores) | {"split": split} | costs(artifact)
    if against is not None:
        if (mend := MENDS.get("quantize" if artifact.quantized else context.stage.kind)) is not None and recovered(context):
            earlier = read_json(captions_file(against.path, split), list)
            check_variety(*([item["caption"] for item in items] for items in (spoken, earlier)), mend)
        pair = paired(np.array([item["cider"] for item in spoken]), ciders(against, data, context.cache, context.progress))
        row |= {"delta_cider": pair.delta, "delta_ci95": list(pair.ci95), "p_value": pair.p_value}
    return row | timed(artifact, parent, context)


def written_down(artifact: Artifact, data: CaptionSet, said: Sequence[tuple[str, float]], scores: metrics.Scores) -> list[dict]:
    """What `artifact` said of `data`, as its file of captions has it from here on."""
    spoken = [
        {"image": example.image_id, "caption": text, "logprob": round(logprob, 4), "cider": round(float(value), 4)}
        for example, (text, logprob), value in zip(data.examples, said, scores.per_image, strict=True)
    ]
    write_json(captions_file(artifact.path, data.examples[0].split), spoken)
    return spoken


def sizes(artifact: Artifact, context: Context) -> dict:
    """Of `measure` what weights have no part in, for a model that nothing has trained since it was cut."""
    parent = context.artifacts.get(context.stage.parent)
    return {"split": context.recipe.data.val_split} | costs(artifact) | timed(artifact, parent, context)


def timed(artifact: Artifact, parent: Artifact | None, context: Context) -> dict:
    """`latency` on pictures of the recipe's val split."""
    data = context.data.split(context.recipe.data.val_split)
    pictures = pixels(data, settings_of(artifact), context.cache, context.progress)[:TIMED_IMAGES]
    return latency(artifact, parent, pictures)


def recovered(context: Context) -> bool:
    """False of a model that is pruned and was not to be recovered, and of what is made of it: little is known of it but its size and speed,
    and little is asked."""
    stages = {stage.name: stage for stage in context.recipe.stages}
    stage = context.stage
    while stage is not None and stage.kind in UNTRAINED:
        config = stage.config
        if stage.kind == "prune" and not (config.recover_epochs or (config.recover_encoder_epochs and cuts_encoder(config))):
            return False
        stage = stages.get(stage.parent)
    return True


def check_variety(said: Sequence[str], before: Sequence[str], mend: str) -> None:
    """StageError where every image gets one caption, and VARIED or more from what it is compared with: a model that runs, and whose numbers
    are broken. (One that was hardly trained says few captions before, too.)"""
    different = len(set(before))
    if len(set(said)) == 1 and different >= VARIED:
        raise StageError(f"all {len(said)} images get the same caption, '{said[0]}', where there were {different} different ones before; "
                         f"try {mend}")


def scored(artifact: Artifact, data: CaptionSet, cache: Path, progress: Progress) -> tuple[list[tuple[str, float]], metrics.Scores]:
    """(caption, log-probability) of every example of `data` at beam 5, and their scores."""
    with progress.task(f"captions of {data.examples[0].split}", len(data)) as task:
        said = captions(artifact, data, BEAM, cache, progress, task.advance)
    return said, metrics.score([text for text, _ in said], [list(example.captions) for example in data.examples])


def senseless(data: CaptionSet, said: Sequence[tuple[str, float]]) -> list[str]:
    """The images of `data` whose (caption, log-probability) has a probability that is no number."""
    return [example.image_id for example, (_, logprob) in zip(data.examples, said, strict=True) if not math.isfinite(logprob)]


def ciders(artifact: Artifact, data: CaptionSet, cache: Path, progress: Progress) -> np.ndarray:
    """CIDEr-D x100 of each image of `data` at beam 5, rounded as in its file: as it was measured, if `artifact` was, and on these images
    (another run may have measured it on others since)."""
    file = captions_file(artifact.path, data.examples[0].split)
    if file.is_file():
        known = {item["image"]: item["cider"] for item in read_json(file, list)}
        if all(example.image_id in known for example in data.examples):
            return np.array([known[example.image_id] for example in data.examples])
    return scored(artifact, data, cache, progress)[1].per_image.round(4)


def accuracy(scores: metrics.Scores) -> dict:
    return {"cider": scores.cider, "cider_ci95": list(scores.cider_ci95), "bleu4": scores.bleu4, "rouge_l": scores.rouge_l,
            "images": scores.images}


def extraction(artifact: Artifact, context: Context) -> dict:
    """The row of a concept extractor, whose captions were not trained: what it costs, and how well it finds what captions mention; of an
    artifact whose extractor was taken away, what it costs alone."""
    model, _, settings = read_captioner(artifact.path)
    if model.concepts is None:
        return costs(artifact)
    val = context.data.split(context.recipe.data.val_split)
    features = grids(model, val, settings, context.cache, context.progress)
    names = read_concepts(context.stage.config.vocabulary)
    precision, recall = precision_recall(model, features, mentioned(val, names))
    found = {"split": context.recipe.data.val_split, "concept_precision": precision, "concept_recall": recall, "images": len(val)}
    return found | costs(artifact)


def baseline(artifact: Artifact, context: Context) -> dict:
    """Stage `baseline`: each image gets the first caption of the training image whose mean encoder feature is nearest by cosine."""
    model, _, settings = read_captioner(artifact.path)
    val = context.data.split(context.recipe.data.val_split)
    train = context.data.split("train")
    known, asked = (mean_features(grids(model, data, settings, context.cache, context.progress)) for data in (train, val))
    nearest = [int(index) for i in range(0, len(asked), 256) for index in (asked[i : i + 256] @ known.T).argmax(1)]
    said = [train.examples[index].captions[0] for index in nearest]
    scores = metrics.score(said, [list(example.captions) for example in val.examples])
    return accuracy(scores) | {"split": context.recipe.data.val_split}


def mean_features(grid: np.ndarray) -> np.ndarray:
    """(N, G, channels) -> (N, channels) of length one."""
    mean = np.concatenate([grid[i : i + 256].astype(np.float32).mean(1) for i in range(0, len(grid), 256)])
    return mean / np.linalg.norm(mean, axis=1, keepdims=True).clip(min=1e-9)


def captions(
    artifact: Artifact, data: CaptionSet, beam: int, cache: Path, progress: Progress, advance=lambda n: None
) -> list[tuple[str, float]]:
    """(caption, log-probability) of every example of `data`. Graphs run in ONNX Runtime, float artifacts in PyTorch."""
    said: list[tuple[str, float]] = []
    if artifact.graphs:
        captioner = runtime.Captioner(artifact.path, thread_count())
        pictures = pixels(data, captioner.settings, cache, progress)
        for start in range(0, len(data), BATCH):
            batch = np.stack([runtime.pixels(picture, captioner.settings) for picture in pictures[start : start + BATCH]])
            said += captioner.captions(batch, beam=beam)
            advance(len(batch))
        return said
    model, tokenizer, settings = read_captioner(artifact.path)
    features = grids(model, data, settings, cache, progress)
    spoken, special = narrowed(model, tokenizer)
    where = device()
    model.to(where)
    for start in range(0, len(data), BATCH):
        grid = torch.from_numpy(np.array(features[start : start + BATCH])).to(where).float()
        for hypothesis in beam_search(model, grid, special, beam, model.config.max_tokens):
            said.append((decode_caption(tokenizer, spoken[list(hypothesis.tokens)].tolist()), hypothesis.logprob))
        advance(len(grid))
    return said


def narrowed(model: LightCap, tokenizer: Tokenizer) -> tuple[Tensor, Special]:
    """Takes from `model` the word pieces that no training caption held, which have e^-100 of the probability: it says the same, in part of
    the time. Returns the ids (S,) of those that stay, and the special ones' places among them."""
    special, seen = Special.of(tokenizer), model.heads.bias > UNSEEN_BIAS / 2
    seen[[special.start, special.end, *model.own_pieces()]] = True
    spoken = seen.nonzero().flatten()
    model.narrow(spoken)
    return spoken, special.among(spoken)


def caption_of_image(artifact: Artifact, beam: int = 1) -> Callable[[np.ndarray | Image.Image], tuple[str, float]]:
    """A float artifact's function from a decoded image, PIL's or (H, W, 3) uint8, to (caption, log-probability)."""
    model, tokenizer, settings = read_captioner(artifact.path)
    special = Special.of(tokenizer)

    @torch.inference_mode()
    def caption(image: np.ndarray | Image.Image) -> tuple[str, float]:
        grid = model.encode(torch.from_numpy(runtime.pixels(image, settings)[None]))
        [found] = beam_search(model, grid, special, beam, model.config.max_tokens)
        return decode_caption(tokenizer, found.tokens), found.logprob

    return caption


def settings_of(artifact: Artifact) -> dict:
    """Its preprocessor_config.json. ModelError where there is none, or half of one."""
    file = artifact.path / "preprocessor_config.json"
    try:
        return runtime.read_preprocessing(file)
    except (OSError, ValueError):
        raise ModelError(f"{file}, which says what is done to a picture, is absent or not whole; copy it again") from None


def evaluate(
    artifact: Artifact, data: CaptionSet, beam: int, progress: Progress, also: Callable | None = None, say: Callable | None = None
) -> dict:
    """`lightcap eval`: scores of `data`, one split, x100; `also(captions, references)` gives more of them. Of a captioner that others made
    `say(data, beam, advance)` gives the captions."""
    with tempfile.TemporaryDirectory() as cache, progress.task("captions", len(data)) as task:
        said = say(data, beam, task.advance) if say else captions(artifact, data, beam, Path(cache), progress, task.advance)
    if broken := senseless(data, said):
        raise ModelError(f"{artifact.path}: the log-probabilities of {len(broken)} captions, the first of {broken[0]}, are not finite: its "
                         "weights are damaged; make it anew")
    written, wanted = [text for text, _ in said], [list(example.captions) for example in data.examples]
    return metrics.score(written, wanted).row() | (also(written, wanted) if also else {})
