"""What a recipe may say: one frozen dataclass per section and per stage key. Units stand in the names.

A field's type is what YAML must hold there; its default is used when the recipe is silent. `as` and `from` belong to every stage, `against`
to those that make captioners: `compress.recipe` handles them. No torch is imported here: wrong recipes are refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where pictures and captions come from (`compress.data.load`)."""

    source: str = "scenes"
    captions: str | None = None  # file; of COCO, several with commas between them; of 'datasets', a column
    images: str | None = None  # folder; of 'datasets', also a name on the hub
    val_split: str = "val"  # what rows are measured on, and gates and searches choose by
    train_images: int | None = None  # drawn from that split by `seed`, or made; all if absent
    val_images: int | None = None
    image_size: int | None = None  # of generated scenes; photos are squashed to the student section's
    seed: int = 17
    max_unreadable: float = 0.01  # a share of the images


@dataclass(frozen=True, kw_only=True)
class Student:
    """The model to deploy, and the image encoder and tokenizer that every model of the recipe shares. Of the encoder and of sizes, None
    means the preset's own; sizes hold for this preset, not for another that a stage names. Weights are a word (`imagenet`, `openai`,
    `minilm`; of an encoder `none`, too), a file, a folder, or a name on the hub."""

    preset: str = "lightcap"  # or tiny, minilm-student, ... (students/lightcap/config.py)
    encoder: str | None = None  # clip-rn50, efficientnet-lite0, resnet-small
    encoder_weights: str | None = None  # if absent, drawn anew
    fusion_weights: str | None = None  # if absent, drawn anew, or in 'distill' the first teacher's layers
    tokenizer: str | None = None  # that of the fusion's weights where the section names some, else the shipped word pieces of English
    layers: int | None = None
    hidden: int | None = None
    attention_heads: int | None = None
    ffn: int | None = None
    heads: int | None = None
    image_size: int | None = None  # pixels a side that pictures are squashed to (the data's or the encoder's own if absent)


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW on a linear schedule with warm-up, as in Oscar and VinVL. Batches are counted in images, each with all its captions."""

    epochs: float = 1.0
    batch_images: int = 32
    learning_rate: float = 3e-4  # the highest
    warmup: float = 0.05  # a share of the steps
    final_learning_rate: float = 0.02  # a share of the highest
    weight_decay: float = 0.05  # of matrices; none of biases and norms
    dropout: float = 0.1
    clip_norm: float = 1.0  # of all gradients together
    precision: str = "auto"  # fp32 or bf16: on a CPU, the one that it multiplies faster in
    seed: int | None = None  # the recipe's if absent


@dataclass(frozen=True, kw_only=True)
class Encoding(Optimisation):
    """Training that may tune the image encoder, too."""

    encoder: str = "frozen"
    encoder_learning_rate: float = 1e-3
    flip: bool = False  # mirrors half of the pictures, while they are encoded; not for captions that tell left from right
    crop: float = 0.0  # cuts up to this share off the sides of pictures, while they are encoded


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A finished captioner: BLIP, GIT or CoCa, or one of lightcap's own. It is measured, and writes a caption of each training image, from
    which students can learn."""

    model: str | None = None  # an artifact's or a run's folder, or OWNER/NAME on the hub


@dataclass(frozen=True, kw_only=True)
class Concepts(Encoding):
    """The concept extractor: from the words of the captions, and from labelled regions where there are some. A tuned encoder learns with
    it to find what captions speak of."""

    learning_rate: float = 1e-3
    precision: str = "fp32"
    preset: str | None = None
    vocabulary: str | None = None  # a file with a concept a line; the shipped list if absent
    text_encoder: str | None = None  # minilm, openai or CLIP RN50's weights; if absent, openai beside CLIP's encoder, else minilm
    inner: int = 1024  # width of the alignment's hidden layer
    pieces: int = 20  # that concepts fill in the prefix; 0 takes the parent's extractor away
    regions: tuple[str, ...] | None = None  # labelled ones: Visual Genome's objects.json; or COCO's instances, of several years a list
    boxes: str | None = None  # a detector's, COCO's results format: what training looks at in place of windows
    image_sizes: str | None = None  # COCO's JSON or Visual Genome's image_data.json
    region_weight: float = 1.0  # of the labelled regions' loss, beside that of the captions' words


@dataclass(frozen=True, kw_only=True)
class Train(Encoding):
    """Cross-entropy training of a captioner: from a preset, or onward from the artifact that `from:` names."""

    preset: str | None = None
    fusion_weights: str | None = None
    label_smoothing: float = 0.1
    objective: str | None = None  # causal, if it starts anew
    extractor: str | None = None  # the stage whose image encoder and concept extractor a new captioner takes
    modulator: int | None = None  # inner width; 0: none
    zero_layers: int = 0  # a new captioner's first ones, which start nearly as if they were not there, whatever the checkpoint holds
    new_learning_rate: float | None = None  # of grid projection, modulator and heads, which no checkpoint of a language model fills
    grid_dropout: float = 0.0  # of the features of the grid
    consensus: float = 0.0  # 0 to 1: the share of a caption's weight that is its CIDEr-D against its image's other captions, over the mean
    matching_weight: float = 0.0  # of telling replaced concepts from a picture's own
    word_weight: float = 0.0  # of the word classifier on the grid, while the encoder is tuned
    concept_weight: float = 0.0  # of finding concepts, as in 'concepts', while the encoder is tuned: an extractor left as it was finds less


@dataclass(frozen=True, kw_only=True)
class Distill(Encoding):
    """Ensemble distillation: teacher i supervises head i; hidden states and attention come from the first teacher. Of teachers that are
    `pretrained`, whose layers and encoders are not a student's, it learns the captions that they wrote (or, without `captions`, people's),
    and of those that have its word pieces the tokens. Other teachers are asked once, or, where `anew`, of all that it sees."""

    teachers: tuple[str, ...] = ()
    extractor: str | None = None  # of `pretrained` teachers: the stage whose image encoder and concept extractor a new student takes
    ensemble: str = "each"  # a head's teachers: its own; all of them; or its own and the mean of the heads before it
    heads: int | None = None  # of a new student (the student section's if absent), or copies of the one that its parent has
    modulator: int | None = None  # inner width of a new student's (its first teacher's if absent, of pretrained ones the preset's); 0: none
    init: str = "teacher"  # the first teacher's layers; weights: the student section's fusion_weights; random, as weights where it has none
    ffn_share: float | None = None  # a new student's feed-forward width over its first teacher's, where its section has no ffn
    label_smoothing: float = 0.1
    match: tuple[str, ...] = ("tokens",)  # of pretrained teachers captions, tokens
    match_epochs: float = 1.0  # the first ones, in which hidden states and attention are matched
    temperature: float = 1.0  # of the teachers' and the student's distributions
    top_k: int = 16  # pieces of a teacher's distribution that are kept; the rest is one class
    token_weight: float = 0.8  # of the teachers' tokens; the captions' own have what is left to 1
    concept_weight: float = 0.0  # of finding concepts as the teachers do, while the encoder is tuned
    hidden_weight: float = 1.0
    attention_weight: float = 1.0

    @property
    def anew(self) -> bool:
        """Whether pictures are encoded in every step, and teachers asked of them then."""
        return self.encoder == "tuned" or self.flip or self.crop > 0

    @property
    def asks_tokens(self) -> bool:
        """Whether what the teachers say is learned at all."""
        return "tokens" in self.match and self.token_weight > 0


@dataclass(frozen=True, kw_only=True)
class Scst(Optimisation):
    """CIDEr optimisation: `samples` captions drawn per image, each rewarded against the mean of the others or the greedy caption."""

    learning_rate: float = 1e-5
    samples: int = 5
    draw: str = "samples"  # by chance, at `temperature`; or the hypotheses of a beam search
    temperature: float = 1.0
    baseline: str = "mean"  # of the other samples; or greedy, the greedy caption's reward
    flip: bool = False  # mirrors half of the pictures
    crop: float = 0.0  # cuts up to this share off the sides of pictures


@dataclass(frozen=True, kw_only=True)
class Average:
    """The mean of the weights of the stage that it works on and of `others`, ends of one training."""

    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Keeps the word pieces that training captions use, those that a teacher's captions taught, and every single character."""

    keep: str = "seen"
    min_count: int = 1  # in all training captions


@dataclass(frozen=True, kw_only=True)
class Prune(Optimisation):
    """Structured pruning to a target: a share of the parent's MACs per caption or of its parameters, megabytes on disk, or milliseconds a
    caption (of the model alone, in PyTorch on one thread); of several, all are met; or to fewer `layers` alone. Of several `steps`, one
    that loses more than `max_drop_cider` on val is taken back, and the last good one is the stage's artifact; of the first, the gate is
    missed."""

    macs: float | None = None
    params: float | None = None
    mb: float | None = None
    ms: float | None = None
    parts: tuple[str, ...] = ("encoder", "fusion", "concepts")
    layers: int | None = None  # of the fusion, that stay: those whose absence moves the captions least leave first
    importance: str = "caption"  # what ranks channels (compress/stages/prune/importance.py)
    ratios: str = "importance"  # what compares parts: that, or corrected by how far captions move without half of each
    steps: int = 1
    round_to: int = 8  # widths that stay are multiples of it
    recover_epochs: float = 1.0
    recover_encoder_epochs: float = 1.0
    encoder_learning_rate: float = 1e-3
    recover_concepts_epochs: float = 4.0  # of its two layers, on stored features: some seconds for a thousand pictures
    concepts_learning_rate: float = 1e-3
    flip: bool = False  # mirrors half of the pictures, while the encoder recovers
    crop: float = 0.0  # cuts up to this share off the sides of pictures, while the encoder recovers
    label_smoothing: float = 0.1
    temperature: float = 1.0  # as in 'distill': the parent teaches what is left of it
    top_k: int = 16
    token_weight: float = 0.8
    max_drop_cider: float | None = None


UNRECOVERED = {"recover_epochs": 0.0, "recover_encoder_epochs": 0.0, "recover_concepts_epochs": 0.0}  # of Prune: shapes alone


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Static INT8: activations by calibration on training images, weights per output channel. `smoothing` is SmoothQuant's alpha, for what
    feed-forward layers read; `rounding` is gptq, by what each layer reads of those images, or to nearest. `reduce_range` gives weights 7
    bits, so that no sum of two products leaves 16 bits: what the fast products of x86 processors without VNNI need. Where CIDEr on val
    falls by more than `max_drop_cider`, up to `trials` more models are tried: one whose weights were tuned for `tune_epochs`, then with
    its worst parts in float. Where the recipe is silent, that is TRIALS and TUNE_EPOCHS with a `max_drop_cider`, and nothing without."""

    TRIALS: ClassVar = 4
    TUNE_EPOCHS: ClassVar = 1.0


    scheme: str = "static"
    calibration_images: int = 128
    smoothing: float = 0.8  # 0: none
    rounding: str = "gptq"
    reduce_range: bool = False
    trials: int | None = None
    tune_epochs: float | None = None  # of quantization-aware fine-tuning; without trials, always
    tune_learning_rate: float = 1e-5
    sensitivity: bool = False  # writes what each part loses in INT8, sensitivity.json
    max_weight_ratio: float = 0.35  # bytes of INT8 over fp32 weights at most
    max_drop_cider: float | None = None

    def __post_init__(self) -> None:
        if self.trials is None:
            object.__setattr__(self, "trials", 0 if self.max_drop_cider is None else self.TRIALS)
        if self.tune_epochs is None:
            object.__setattr__(self, "tune_epochs", self.TUNE_EPOCHS if self.trials else 0.0)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the folder that captions by itself, in the parent's own precision."""


STAGES = {
    "concepts": Concepts,
    "train": Train,
    "distill": Distill,
    "scst": Scst,
    "average": Average,
    "vocabulary": Vocabulary,
    "prune": Prune,
    "quantize": Quantize,
    "export": Export,
    "pretrained": Pretrained,
}

CHOICES = {  # of presets and encoders, those of students/lightcap, whose import would load torch
    ("preset",): ("lightcap", "teacher", "minilm-teacher", "minilm-student", "scenes-teacher", "scenes-student", "tiny"),
    ("student", "encoder"): ("clip-rn50", "efficientnet-lite0", "resnet-small"),
    ("data", "source"): ("scenes", "karpathy", "coco", "flickr8k", "datasets"),
    ("concepts", "encoder"): ("frozen", "tuned"),
    ("train", "encoder"): ("frozen", "tuned"),
    ("distill", "encoder"): ("frozen", "tuned"),
    ("train", "objective"): ("causal", "masked"),
    ("distill", "init"): ("teacher", "weights", "random"),
    ("distill", "ensemble"): ("each", "all", "running"),
    ("distill", "match"): ("tokens", "hidden", "attention", "captions"),
    ("scst", "draw"): ("samples", "beams"),
    ("scst", "baseline"): ("mean", "greedy"),
    ("prune", "importance"): ("caption", "distillation", "magnitude"),
    ("prune", "ratios"): ("importance", "sensitivity"),
    ("prune", "parts"): ("encoder", "fusion", "concepts", "hidden"),
    ("quantize", "scheme"): ("static",),
    ("quantize", "rounding"): ("gptq", "nearest"),
    ("vocabulary", "keep"): ("seen",),
    ("precision",): ("auto", "fp32", "bf16"),
}

# What a number may be: (least, most, least is allowed, most is allowed), by the name of the key, in every section and stage.
SHARE = (0.0, 1.0, False, False)
PART = (0.0, 1.0, True, False)
WHOLE = (0.0, 1.0, True, True)
ABOVE_ZERO = (0.0, math.inf, False, False)
NOT_NEGATIVE = (0.0, math.inf, True, False)
COUNT = (1, math.inf, True, False)

RANGES = {
    "train_images": COUNT,
    "val_images": COUNT,
    "image_size": COUNT,
    "max_unreadable": WHOLE,
    "seed": (0, 2**32 - 1, True, True),
    "layers": COUNT,
    "hidden": COUNT,
    "attention_heads": COUNT,
    "ffn": COUNT,
    "heads": COUNT,
    "epochs": ABOVE_ZERO,
    "batch_images": COUNT,
    "inner": COUNT,
    "pieces": (0, 20, True, True),
    "region_weight": NOT_NEGATIVE,
    "modulator": NOT_NEGATIVE,
    "learning_rate": ABOVE_ZERO,
    "new_learning_rate": ABOVE_ZERO,
    "encoder_learning_rate": ABOVE_ZERO,
    "concepts_learning_rate": ABOVE_ZERO,
    "warmup": PART,
    "final_learning_rate": WHOLE,
    "weight_decay": NOT_NEGATIVE,
    "label_smoothing": PART,
    "dropout": PART,
    "grid_dropout": PART,
    "zero_layers": NOT_NEGATIVE,
    "crop": PART,
    "clip_norm": ABOVE_ZERO,
    "match_epochs": NOT_NEGATIVE,
    "temperature": ABOVE_ZERO,
    "top_k": COUNT,
    "token_weight": WHOLE,
    "word_weight": NOT_NEGATIVE,
    "concept_weight": NOT_NEGATIVE,
    "consensus": WHOLE,
    "matching_weight": NOT_NEGATIVE,
    "hidden_weight": NOT_NEGATIVE,
    "attention_weight": NOT_NEGATIVE,
    "samples": (2, math.inf, True, False),
    "min_count": COUNT,
    "ffn_share": SHARE,
    "macs": SHARE,
    "params": SHARE,
    "mb": ABOVE_ZERO,
    "ms": ABOVE_ZERO,
    "steps": COUNT,
    "round_to": COUNT,
    "recover_epochs": NOT_NEGATIVE,
    "recover_encoder_epochs": NOT_NEGATIVE,
    "recover_concepts_epochs": NOT_NEGATIVE,
    "max_drop_cider": NOT_NEGATIVE,
    "calibration_images": COUNT,
    "smoothing": WHOLE,
    "trials": NOT_NEGATIVE,
    "tune_epochs": NOT_NEGATIVE,
    "tune_learning_rate": ABOVE_ZERO,
    "max_weight_ratio": (0.0, 1.0, False, True),
}


def references(config) -> tuple[str, ...]:
    """The earlier stages that a stage's settings name, beside the one it works on."""
    extractor = getattr(config, "extractor", None)
    return (*getattr(config, "teachers", ()), *getattr(config, "others", ()), *((extractor,) if extractor else ()))


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: `kind` is its key, `name` its `as:` label, `parent` the stage it works on (None: it starts anew), `against` the
    stage that its row is compared with: its parent, the first of its teachers, or the one that `against:` names; `place` the file and line
    where it is written, as errors begin with."""

    kind: str
    name: str
    parent: str | None
    config: Pretrained | Concepts | Train | Distill | Scst | Average | Vocabulary | Prune | Quantize | Export | None  # None: the baseline
    against: str | None = None
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `places`: by SECTION.KEY, the file and line, or the `--set`, of each key that its sections have, as errors begin
    with them."""

    name: str
    seed: int
    data: Data
    student: Student
    stages: tuple[Stage, ...]
    path: Path = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False)


def vocabulary_of(recipe: Recipe, stage: Stage) -> str | None:
    """The file of concepts that the captioner of `stage` was taught to find; None for the shipped ones, and where it finds none."""
    stages = {other.name: other for other in recipe.stages}
    while stage.kind != "concepts":
        before = stage.parent or getattr(stage.config, "extractor", None) or next(iter(references(stage.config)), None)
        if before is None:
            return None
        stage = stages[before]
    return stage.config.vocabulary
