"""Scenes: the embedded caption set. Pictures and captions are made from a seed; there is no file on disk.

A scene is one of ten backgrounds and one to four objects that differ in shape (12), colour (10), texture (4), size (3),
count (1 to 4), position and relation. `compose` decides what is there, `compress.data.pictures` draws it under varied
light and noise, and `compress.data.wording` describes it five times, as five annotators who notice different things.
Composition and captions need `random.Random` alone, seeded by text, so they are equal on every machine.

Splits are ranges of scene numbers: train counts from 0, val from 400,000, test from 800,000, so that more training
scenes move nothing else.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from compress.data.captions import CaptionSet, Example
from compress.errors import DataError

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "diamond",
    "heart",
    "moon",
    "arrow",
    "flower",
    "house",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 0.22, "medium": 0.30, "large": 0.45}  # width of an object in widths of the picture
POSITIONS = {
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "middle": (0.5, 0.5),
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
}
# Backgrounds, each with the colours that would drown in it.
BACKGROUNDS = {
    "sky": ("blue", "white"),
    "grass": ("green",),
    "sand": ("yellow", "orange", "brown"),
    "night": ("black", "blue", "purple", "brown"),
    "brick": ("red", "brown", "orange"),
    "wood": ("brown", "orange", "yellow"),
    "water": ("blue", "green"),
    "snow": ("white",),
    "sunset": ("orange", "pink", "purple", "red"),
    "gray": (),
}
# Colours that are not put side by side in one scene: in dim light they are hard to tell apart.
CLOSE = {
    "red": ("orange", "pink", "brown"),
    "orange": ("red", "yellow", "brown"),
    "yellow": ("orange", "white"),
    "blue": ("purple",),
    "purple": ("blue", "pink"),
    "pink": ("red", "purple", "white"),
    "brown": ("red", "orange", "black"),
    "black": ("brown",),
    "white": ("yellow", "pink"),
}
SOLID = ("circle", "square", "triangle", "heart")  # wide enough to show a texture when small
HOLDERS = ("circle", "square", "ring", "heart")  # roomy enough for another object inside
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
FIRST_NUMBER = {"train": 0, "val": 400_000, "test": 800_000}
MARGIN = 0.02


@dataclass(frozen=True)
class Thing:
    """One object, or several equal ones.

    `spots` are (x, y, width) of each: centre from the top left, and width, in widths of the picture.
    """

    shape: str
    colour: str
    texture: str
    size: str
    spots: tuple[tuple[float, float, float], ...]

    @property
    def count(self) -> int:
        return len(self.spots)


@dataclass(frozen=True)
class Scene:
    """What a picture holds. Things are drawn last to first, so things[0] is in front.

    `relation` is that of things[0] to the others: above, below, left, right, inside, front, between, or None.
    `arrangement` (row, column, scattered) and `position` (a key of POSITIONS) belong to pictures of one kind of object.
    """

    number: int
    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    arrangement: str | None = None
    position: str | None = None


def pick(rng: random.Random, options: Sequence):
    """An element of `options`; unlike `rng.choice` its draw is promised to stay the same over Python versions."""
    return options[int(rng.random() * len(options))]


def compose(seed: int, number: int) -> Scene:
    """The scene of this number: decides what is in it and where, draws nothing."""
    rng = random.Random(f"scene {seed} {number}")
    background = pick(rng, tuple(BACKGROUNDS))
    draw = rng.random()
    if draw < 0.14:
        return _one(rng, number, background)
    if draw < 0.54:
        return _pair(rng, number, background)
    if draw < 0.72:
        return _several(rng, number, background)
    if draw < 0.88:
        return _several_and_one(rng, number, background)
    return _between(rng, number, background)


def _look(
    rng: random.Random, background: str, sizes: Sequence[str], others: Sequence[dict] = (), plain: bool = False
) -> dict:
    """Shape, colour, texture and size of a thing that stands out from the background and from the `others`."""
    taken = [other["colour"] for other in others]
    free = [
        colour
        for colour in COLOURS
        if colour not in BACKGROUNDS[background]
        and colour not in taken
        and not any(colour in CLOSE.get(other, ()) for other in taken)
    ]
    size = pick(rng, sizes)
    shapes = [shape for shape in SHAPES if shape not in [other["shape"] for other in others]]
    shape = pick(rng, shapes)
    textured = rng.random() < 0.55 and not plain and (size != "small" or shape in SOLID)
    return {
        "shape": shape,
        "colour": pick(rng, free),
        "texture": pick(rng, TEXTURES[1:]) if textured else "plain",
        "size": size,
    }


def _width(rng: random.Random, size: str) -> float:
    return SIZES[size] * (0.95 + 0.1 * rng.random())


def _line(
    rng: random.Random, widths: Sequence[float], axis: int, across: float, wobble: float
) -> list[tuple[float, float, float]]:
    """Spots in a line along `axis` (0: left to right, 1: top to bottom), without overlap.

    On the other axis they lie within `wobble` of the coordinate `across`, as far as the picture allows.
    """
    free = 1 - 2 * MARGIN - sum(widths)
    gap = min(0.12, free / max(1, len(widths) - 1)) * (0.4 + 0.6 * rng.random()) if len(widths) > 1 else 0.0
    start = MARGIN + (free - gap * (len(widths) - 1)) * rng.random()
    spots = []
    for width in widths:
        along, side = start + width / 2, across + wobble * (2 * rng.random() - 1)
        side = min(max(side, width / 2 + MARGIN), 1 - width / 2 - MARGIN)
        spots.append((along, side, width) if axis == 0 else (side, along, width))
        start += width + gap
    return spots


def _place(rng: random.Random, position: str, width: float) -> tuple[float, float, float]:
    room = 1 - width - 2 * MARGIN
    x, y = (
        MARGIN + width / 2 + room * min(max(share + 0.08 * (2 * rng.random() - 1), 0), 1)
        for share in POSITIONS[position]
    )
    return x, y, width


def _one(rng: random.Random, number: int, background: str) -> Scene:
    look = _look(rng, background, tuple(SIZES))
    position = pick(rng, tuple(POSITIONS))
    spot = _place(rng, position, _width(rng, look["size"]))
    return Scene(number, background, (Thing(**look, spots=(spot,)),), position=position)


def _pair(rng: random.Random, number: int, background: str) -> Scene:
    relation = pick(rng, (*OPPOSITE, *OPPOSITE, "inside", "inside", "front", "front"))
    if relation == "inside":
        holder = _look(rng, background, ("large",), plain=True) | {"shape": pick(rng, HOLDERS)}
        inner = _look(rng, background, ("small",), (holder,))
        width = 0.52 + 0.06 * rng.random()
        x, y, _ = _place(rng, "middle", width)
        x, y = x + 0.16 * (2 * rng.random() - 1), y + 0.16 * (2 * rng.random() - 1)
        lift = 0.03 if holder["shape"] == "heart" else 0.0  # a heart is widest in its upper half
        spots = (x, y - lift, _width(rng, "small")), (x, y, width)
        return _two(number, background, inner, holder, spots, relation)
    if relation == "front":
        behind = _look(rng, background, ("medium", "large"))
        front = _look(rng, background, ("small", "medium") if behind["size"] == "large" else ("small",), (behind,))
        far, near = _width(rng, behind["size"]), _width(rng, front["size"])
        reach = 0.36 * far + 0.12 * near
        dx, dy = pick(rng, ((1, 1), (1, -1), (-1, 1), (-1, -1)))
        x, y, _ = _place(rng, "middle", far)
        spots = (x + dx * reach * 0.75, y + dy * reach * 0.75, near), (x, y, far)
        return _two(number, background, front, behind, spots, relation)
    main = _look(rng, background, tuple(SIZES))
    other = _look(rng, background, tuple(SIZES), (main,))
    ordered = (main, other) if relation in ("above", "left") else (other, main)
    axis = 1 if relation in ("above", "below") else 0
    spots = _line(rng, [_width(rng, look["size"]) for look in ordered], axis, 0.25 + 0.5 * rng.random(), 0.05)
    return _two(number, background, main, other, spots if ordered[0] is main else spots[::-1], relation)


def _two(number: int, background: str, main: dict, other: dict, spots: Sequence, relation: str) -> Scene:
    things = Thing(**main, spots=(tuple(spots[0]),)), Thing(**other, spots=(tuple(spots[1]),))
    return Scene(number, background, things, relation=relation)


def _several(rng: random.Random, number: int, background: str) -> Scene:
    count = pick(rng, (2, 3, 4))
    look = _look(rng, background, {2: ("small", "medium", "large"), 3: ("small", "medium"), 4: ("small",)}[count])
    widths = [_width(rng, look["size"])] * count
    arrangement = pick(rng, ("row", "column", "scattered") if count > 2 else ("row", "column"))
    if arrangement == "scattered":
        corners = [name for name in POSITIONS if " " in name]
        corners = sorted(corners, key=lambda name: rng.random())[:count]
        spots = [_place(rng, name, width) for name, width in zip(corners, widths, strict=True)]
        return Scene(number, background, (Thing(**look, spots=tuple(spots)),), arrangement=arrangement)
    axis = 0 if arrangement == "row" else 1
    position = pick(rng, ("top", "middle", "bottom") if axis == 0 else ("left", "middle", "right"))
    share = POSITIONS[position][1 - axis]
    across = widths[0] / 2 + MARGIN + share * (1 - widths[0] - 2 * MARGIN)
    spots = _line(rng, widths, axis, across, 0.02)
    return Scene(number, background, (Thing(**look, spots=tuple(spots)),), arrangement=arrangement, position=position)


def _several_and_one(rng: random.Random, number: int, background: str) -> Scene:
    """Two or three small objects in a line, above, below, left or right of a larger one."""
    relation = pick(rng, tuple(OPPOSITE))
    many = _look(rng, background, ("small",))
    single = _look(rng, background, ("medium", "large"), (many,))
    axis = 0 if relation in ("above", "below") else 1  # of the line; the single object stands across it
    line = _line(rng, [_width(rng, "small")] * pick(rng, (2, 3)), axis, 0.5, 0.0)
    width = _width(rng, single["size"])
    thick = line[0][2]
    gap = 0.04 + 0.08 * rng.random()
    start = MARGIN + (1 - 2 * MARGIN - thick - gap - width) * rng.random()
    if relation in ("above", "left"):
        side, across = start + thick / 2, start + thick + gap + width / 2
    else:
        side, across = start + width + gap + thick / 2, start + width / 2
    along = sum(spot[axis] for spot in line) / len(line)
    along = min(max(along, width / 2 + MARGIN), 1 - width / 2 - MARGIN)
    spots = tuple((spot[0], side, spot[2]) if axis == 0 else (side, spot[1], spot[2]) for spot in line)
    place = (along, across, width) if axis == 0 else (across, along, width)
    return Scene(number, background, (Thing(**many, spots=spots), Thing(**single, spots=(place,))), relation=relation)


def _between(rng: random.Random, number: int, background: str) -> Scene:
    """One object between two others, which are equal in two of five such scenes."""
    main = _look(rng, background, ("small", "medium"))
    first = _look(rng, background, ("small", "medium"), (main,))
    twins = rng.random() < 0.4
    last = first if twins else _look(rng, background, ("small", "medium"), (main, first))
    widths = [_width(rng, look["size"]) for look in (first, main, last)]
    if twins:
        widths[2] = widths[0]
    spots = _line(rng, widths, pick(rng, (0, 1)), 0.3 + 0.4 * rng.random(), 0.04)
    middle = Thing(**main, spots=(spots[1],))
    if twins:
        return Scene(number, background, (middle, Thing(**first, spots=(spots[0], spots[2]))), relation="between")
    ends = Thing(**first, spots=(spots[0],)), Thing(**last, spots=(spots[2],))
    return Scene(number, background, (middle, *ends), relation="between")


def load(data) -> CaptionSet:
    """`data.train_images` (4,000) train, `data.val_images` (500) val, and always 500 test scenes of `data.image_size` (80) pixels.

    The fingerprint is over seed, size, every caption, and the pixels of a sample of pictures, so that a change in the
    drawing shows. Raises DataError for a size or a number that cannot be.
    """
    from compress.data.pictures import draw
    from compress.data.wording import describe

    counts = {"train": 4000 if data.train_images is None else data.train_images}
    counts |= {"val": 500 if data.val_images is None else data.val_images, "test": 500}
    size = 80 if data.image_size is None else data.image_size
    if not 48 <= size <= 512:
        raise DataError(f"data.image_size is {size}; scenes are 48 to 512 pixels wide: --set data.image_size=80")
    for split, count in counts.items():
        if not 0 < count <= 400_000:
            raise DataError(f"data.{split}_images is {count}; scenes have 1 to 400,000 {split} images")
    examples = []
    for split, count in counts.items():
        for number in range(FIRST_NUMBER[split], FIRST_NUMBER[split] + count):
            captions = describe(compose(data.seed, number), data.seed)
            examples.append(Example(f"scene-{number:06d}", split, captions))
    marks = {}
    for split in counts:
        its = [example for example in examples if example.split == split]
        digest = hashlib.sha256(json.dumps(["scenes", data.seed, size]).encode())
        for example in its:
            digest.update(json.dumps([example.image_id, example.split, example.captions]).encode())
        for example in its[:: max(1, len(its) // 8)]:
            digest.update(draw(compose(data.seed, int(example.image_id[6:])), data.seed, size).tobytes())
        marks[split] = digest.hexdigest()
    mark = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
    return CaptionSet(tuple(examples), mark, "scenes", reader=partial(_image, seed=data.seed, size=size), marks=marks)


def _image(example: Example, seed: int, size: int):
    from compress.data.pictures import draw

    return draw(compose(seed, int(example.image_id.removeprefix("scene-"))), seed, size)
