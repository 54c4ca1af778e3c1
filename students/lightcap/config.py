"""The architecture of one captioner, as config.json holds it, and the presets."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

PREFIX_POSITION = 64  # captions use the positions before it, prefix tokens the ones from it on


class SizeError(ValueError):
    """Sizes that no captioner can have; `keys` are those that do not go together."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True)
class LightCapConfig:
    """Every size that `LightCap` is built from.

    `shapes` maps the name of a pruned module to the shape of its weight; the model is built by the other fields, its changed modules are
    rebuilt by `shapes`, and then weights load strictly. `grid` is the side of the encoder's output, `channels` its depth. `concepts` is the
    number of word pieces that they fill in the prefix (0: none); `alignment` the widths (inner, text) of the MLP that finds them;
    `concept_vocabulary` how many concepts there are and the most word pieces that one has (None: not trained yet); `modulator` its inner
    width (None: none). `mask_piece` is the id of [MASK] in a model that predicts the piece under it, appended to the caption so far (the
    paper); None: the model predicts the piece that follows.
    """

    encoder: str = "clip-rn50"
    image_size: int = 224
    grid: int = 7
    channels: int = 2048
    layers: int = 4
    hidden: int = 312
    attention_heads: int = 12
    ffn: int = 1200
    vocabulary: int = 30522
    positions: int = 512
    heads: int = 3
    modulator: int | None = None
    concepts: int = 0
    alignment: tuple[int, int] | None = None
    concept_vocabulary: tuple[int, int] | None = None
    mask_piece: int | None = None
    dropout: float = 0.1
    max_tokens: int = 20
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def prefix(self) -> int:
        """Tokens before the caption: concepts and grid."""
        return self.grid**2 + self.concepts

    def to_dict(self) -> dict:
        return {"model_type": "lightcap", **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(values: Mapping) -> LightCapConfig:
        """Raises ValueError for a config.json of another model, or with keys this version does not know."""
        values = dict(values)
        if values.pop("model_type", None) != "lightcap":
            raise ValueError("config.json does not describe a LightCap model (its model_type is not 'lightcap')")
        values.pop("quantized", None)
        known = {f.name for f in dataclasses.fields(LightCapConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config.json holds keys that this version does not know: {', '.join(unknown)}")
        try:
            for name in ("alignment", "concept_vocabulary"):
                if values.get(name):
                    values[name] = tuple(values[name])
            values["shapes"] = {name: tuple(shape) for name, shape in values.get("shapes", {}).items()}
        except (AttributeError, TypeError):
            raise ValueError("config.json: alignment and concept_vocabulary must be lists, and shapes an object of lists") from None
        config = LightCapConfig(**values)
        wrong = [f.name for f in dataclasses.fields(LightCapConfig) if f.type == "int" and not isinstance(getattr(config, f.name), int)]
        if wrong:
            raise ValueError(f"config.json: {', '.join(wrong)} must be whole numbers")
        encoder_spec(config.encoder)
        return config


# Sizes of fusion and heads. Encoder and tokenizer belong to a recipe's `student` section: teacher and student share them.
PRESETS: dict[str, dict] = {
    # The paper's student: CLIP RN50, TinyBERT-4L, three parallel heads.
    "lightcap": {"layers": 4, "hidden": 312, "attention_heads": 12, "ffn": 1200, "heads": 3, "modulator": 39, "concepts": 20,
                 "alignment": (1024, 1024)},
    # The paper's teacher: the same pipeline with BERT-base as fusion.
    "teacher": {"layers": 12, "hidden": 768, "attention_heads": 12, "ffn": 3072, "heads": 1, "modulator": 39, "concepts": 20,
                "alignment": (1024, 1024)},
    # MiniLM-L6-384 as fusion, and a student of half its depth.
    "minilm-teacher": {"layers": 6, "hidden": 384, "attention_heads": 12, "ffn": 1536, "heads": 1},
    "minilm-student": {"layers": 3, "hidden": 384, "attention_heads": 12, "ffn": 1536, "heads": 3},
    # For the generated scenes.
    "scenes-teacher": {"layers": 3, "hidden": 128, "attention_heads": 4, "ffn": 512, "heads": 1, "positions": 128},
    "scenes-student": {"layers": 2, "hidden": 96, "attention_heads": 3, "ffn": 256, "heads": 3, "positions": 128},
    # As small as the tests run it.
    "tiny": {"layers": 2, "hidden": 32, "attention_heads": 2, "ffn": 64, "heads": 2, "positions": 128},
}
DEFAULT_ENCODER = {"lightcap": "clip-rn50", "teacher": "clip-rn50", "minilm-teacher": "efficientnet-lite0",
                   "minilm-student": "efficientnet-lite0"}


def preset(name: str, **overrides) -> LightCapConfig:
    """The named preset with the given fields changed (None changes nothing). ValueError names the nearest preset, SizeError what does not
    go together."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"no preset '{name}' (there are: {', '.join(PRESETS)}){hint}")
    fields = PRESETS[name] | {key: value for key, value in overrides.items() if value is not None}
    encoder = fields.setdefault("encoder", DEFAULT_ENCODER.get(name, "resnet-small"))
    spec = encoder_spec(encoder)
    size = fields.get("image_size", spec.image_size)
    if size % spec.stride:
        raise SizeError(f"image_size ({size}) must be a multiple of {spec.stride}, the stride of {encoder}", "image_size")
    fields |= {"image_size": size, "grid": size // spec.stride, "channels": spec.channels}
    config = LightCapConfig(**fields)
    if config.hidden % config.attention_heads:
        said = f"hidden ({config.hidden}) must be a multiple of attention_heads ({config.attention_heads})"
        raise SizeError(said, "attention_heads", "hidden")
    if config.positions < (needed := PREFIX_POSITION + config.prefix):
        said = f"positions ({config.positions}) must be at least {needed} for a grid of {config.grid} x {config.grid}"
        raise SizeError(said, "image_size")
    return config


def encoder_spec(encoder: str):
    """The entry of ENCODERS; ValueError names the nearest."""
    from students.lightcap.encoder import ENCODERS

    if encoder not in ENCODERS:
        close = difflib.get_close_matches(encoder, ENCODERS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"no image encoder '{encoder}' (there are: {', '.join(ENCODERS)}){hint}")
    return ENCODERS[encoder]
