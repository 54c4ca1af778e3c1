"""Describes a scene five times, as five annotators would: they differ in what they mention, in which order and words.

Some name one object and the background, some the relation of two, some everything; they use "there is", photo style,
the active and the passive voice, either object as subject, and synonyms. Every word is true of the scene. Captions have
5 to 16 words, in lower case, without punctuation; 100,000 of them use 178 different words.

How much they agree, by CIDEr x100 on the 500 test scenes of seed 17: one caption against the other four 168, a
caption of another scene 16, only colour and shape of one object 66, a full description 295.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from compress.data.scenes import OPPOSITE, Scene, Thing, pick

ANNOTATORS = 5
SHORTEST, LONGEST = 5, 16

# Words for one meaning, the usual one first and repeated by weight: people agree more often than not.
NOUNS = {
    "circle": ("circle", "circle", "circle", "disc", "dot"),
    "square": ("square", "square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "ring", "hoop", "wheel"),
    "cross": ("cross", "cross", "cross", "plus sign"),
    "diamond": ("diamond", "diamond", "diamond", "kite"),
    "heart": ("heart",),
    "moon": ("moon", "moon", "moon", "crescent"),
    "arrow": ("arrow", "arrow", "arrow", "pointer"),
    "flower": ("flower", "flower", "flower", "blossom"),
    "house": ("house", "house", "house", "hut"),
}
COLOURS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "purple", "purple", "violet"),
    "pink": ("pink", "pink", "pink", "rose"),
    "brown": ("brown", "brown", "brown", "chocolate"),
    "black": ("black", "black", "black", "dark"),
    "white": ("white", "white", "white", "pale"),
}
PLURALS = {"cross": "crosses", "box": "boxes"}
SHORT_OF_COLOUR = 0.16  # how often a colour goes without saying
SIZES = {"small": ("small", "small", "small", "little", "tiny"), "large": ("large", "large", "large", "big", "big")}
TEXTURES = {
    "striped": ("striped",) * 4 + ("stripy",),
    "dotted": ("dotted", "dotted", "dotted", "spotted"),
    "checkered": ("checkered", "checkered", "checkered", "checked"),
}
WITH_TEXTURE = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
NUMBERS = {2: ("two", "two", "two", "a pair of"), 3: ("three",), 4: ("four",)}
BACKGROUNDS = {
    "sky": ("in the sky", "in the sky", "in a cloudy sky", "against the sky"),
    "grass": ("on the grass", "on the grass", "on grass", "in a grassy field"),
    "sand": ("on the sand", "on the sand", "on sand", "on a sandy beach"),
    "night": ("at night", "in the night sky", "in the night sky", "in a starry sky"),
    "brick": ("on a brick wall", "on a brick wall", "on a wall of bricks"),
    "wood": ("on a wooden floor", "on a wooden floor", "on wooden boards", "on wood"),
    "water": ("on the water", "on the water", "in the water", "on rippling water"),
    "snow": ("in the snow", "in the snow", "on the snow", "on snow"),
    "sunset": ("at sunset", "at sunset", "against a sunset", "in the evening sky"),
    "gray": ("on a gray background", "on a gray background", "on a plain gray background"),
}
VERBS = {
    "sky": ("floats", "floats", "hangs"),
    "night": ("floats", "shines"),
    "sunset": ("floats", "hangs"),
    "water": ("floats", "floats", "drifts"),
    "brick": ("hangs", "is painted"),
    "grass": ("lies", "sits"),
    "sand": ("lies", "sits", "rests"),
    "snow": ("lies", "sits"),
    "wood": ("lies", "sits", "rests"),
    "gray": ("sits", "is placed"),
}
RELATIONS = {
    "above": ("above", "above", "above", "over"),
    "below": ("below", "below", "below", "under", "beneath"),
    "left": ("to the left of", "to the left of", "to the left of", "next to", "beside"),
    "right": ("to the right of", "to the right of", "to the right of", "next to", "beside"),
    "inside": ("inside", "inside", "inside", "within"),
    "front": ("in front of", "in front of", "in front of", "overlapping"),
    "around": ("around", "surrounding"),
    "behind": ("behind", "behind", "behind", "partly hidden by"),
}
CONVERSE = OPPOSITE | {"inside": "around", "front": "behind"}
WHERE = {  # of things[0], seen from things[1] in "... with X above it"
    "above": "above it",
    "below": "below it",
    "left": "to its left",
    "right": "to its right",
    "inside": "inside it",
    "front": "in front of it",
}
PLACES = {
    "left": ("on the left", "on the left", "on the left side"),
    "right": ("on the right", "on the right", "on the right side"),
    "top": ("at the top", "at the top", "near the top"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the middle", "in the center"),
    "top left": ("in the top left corner", "in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the bottom right corner", "at the bottom right"),
}
ARRANGEMENTS = {
    "row": ("in a row", "in a row", "side by side"),
    "column": ("in a column", "in a column", "one above another"),
    "scattered": ("scattered", "scattered around", "spread out"),
}
PHOTO = ("a picture of", "a picture of", "a photo of", "an image of")


def describe(scene: Scene, seed: int) -> tuple[str, ...]:
    """Five different captions of a scene, each 5 to 16 words; equal for equal scene and seed."""
    rng = random.Random(f"words {seed} {scene.number}")
    styles = _styles(scene)
    order = sorted(range(len(styles)), key=lambda style: rng.random())
    captions: list[str] = []
    turn = 0
    while len(captions) < ANNOTATORS:
        caption = styles[order[turn % len(order)]](scene, rng)
        turn += 1
        if caption not in captions and SHORTEST <= len(caption.split()) <= LONGEST:
            captions.append(caption)
    return tuple(captions)


def _styles(scene: Scene) -> tuple:
    if len(scene.things) == 1:
        return _plain, _existing, _active, _placed, _photo, _plain, _placed
    if scene.relation == "between":
        return _between, _between, _between_existing, _flanked, _group, _between_photo, _main_only, _other_only
    return (
        _related,
        _related,
        _relation_existing,
        _relation_active,
        _converse,
        _owning,
        _together,
        _relation_photo,
        _main_only,
        _other_only,
    )


# Noun phrases.


def _phrase(rng: random.Random, thing: Thing, full: float = 1.0) -> str:
    """Such as "a small striped red star" or "three stars", by chance; `full` scales that of size and texture."""
    after = ""
    words = []
    if thing.size in SIZES and rng.random() < 0.55 * full:
        words.append(pick(rng, SIZES[thing.size]))
    if thing.texture in TEXTURES and rng.random() < 0.75 * full:
        if rng.random() < 0.12:
            after = " " + WITH_TEXTURE[thing.texture]
        else:
            words.append(pick(rng, TEXTURES[thing.texture]))
    noun = pick(rng, NOUNS.get(thing.shape, (thing.shape,)))
    if thing.count > 1:
        noun = PLURALS.get(noun, noun + "s")
    if rng.random() > SHORT_OF_COLOUR:
        words.append(pick(rng, COLOURS[thing.colour]))
    words.append(noun)
    article = "an" if words[0][0] in "aeiou" else "a"
    first = pick(rng, NUMBERS[thing.count]) if thing.count > 1 else article
    return " ".join([first, *words]) + after


def _verb(rng: random.Random, scene: Scene, thing: Thing) -> str:
    verb = pick(rng, VERBS[scene.background])
    return verb if thing.count == 1 else _many(verb)


def _many(verb: str) -> str:
    """The plural of a verb phrase: "hangs" to "hang", "is painted" to "are painted"."""
    head, *rest = verb.split()
    return " ".join(["are" if head == "is" else head.removesuffix("s"), *rest])


def _be(thing: Thing) -> str:
    return "is" if thing.count == 1 else "are"


def _there(thing: Thing, phrase: str) -> str:
    """There is a star, there are two stars, there is a pair of stars."""
    return f"there {'is' if phrase.startswith('a') else _be(thing)} {phrase}"


def _ground(rng: random.Random, scene: Scene, share: float = 1.0) -> str:
    return " " + pick(rng, BACKGROUNDS[scene.background]) if rng.random() < share else ""


def _arranged(rng: random.Random, scene: Scene, share: float) -> str:
    return " " + pick(rng, ARRANGEMENTS[scene.arrangement]) if scene.arrangement and rng.random() < share else ""


def _place(rng: random.Random, scene: Scene, share: float) -> str:
    return " " + pick(rng, PLACES[scene.position]) if scene.position and rng.random() < share else ""


# One kind of object.


def _plain(scene: Scene, rng: random.Random) -> str:
    return _phrase(rng, scene.things[0]) + _arranged(rng, scene, 0.6) + _ground(rng, scene)


def _existing(scene: Scene, rng: random.Random) -> str:
    phrase = _phrase(rng, scene.things[0])
    return (
        _there(scene.things[0], phrase)
        + _arranged(rng, scene, 0.5)
        + _place(rng, scene, 0.3)
        + _ground(rng, scene, 0.8)
    )


def _active(scene: Scene, rng: random.Random) -> str:
    thing = scene.things[0]
    said = f"{_phrase(rng, thing)} {_verb(rng, scene, thing)}"
    return said + _arranged(rng, scene, 0.6) + _place(rng, scene, 0.3) + _ground(rng, scene, 0.8)


def _placed(scene: Scene, rng: random.Random) -> str:
    thing = scene.things[0]
    seen = pick(rng, ("", "", f" {_be(thing)} seen"))
    return _phrase(rng, thing) + seen + _arranged(rng, scene, 0.5) + _place(rng, scene, 1.0) + _ground(rng, scene, 0.4)


def _photo(scene: Scene, rng: random.Random) -> str:
    return f"{pick(rng, PHOTO)} {_phrase(rng, scene.things[0])}" + _arranged(rng, scene, 0.4) + _ground(rng, scene, 0.6)


# Two kinds of object: things[0] in relation to things[1].


def _both(rng: random.Random, scene: Scene) -> tuple[str, str, str]:
    main, other = scene.things[:2]
    return _phrase(rng, main), pick(rng, RELATIONS[scene.relation]), _phrase(rng, other, 0.8)


def _related(scene: Scene, rng: random.Random) -> str:
    main, relation, other = _both(rng, scene)
    return f"{main} {relation} {other}" + _ground(rng, scene, 0.45)


def _relation_existing(scene: Scene, rng: random.Random) -> str:
    main, relation, other = _both(rng, scene)
    return f"{_there(scene.things[0], main)} {relation} {other}" + _ground(rng, scene, 0.25)


def _relation_active(scene: Scene, rng: random.Random) -> str:
    main, relation, other = _both(rng, scene)
    verb = pick(rng, (_be(scene.things[0]), _be(scene.things[0]), _verb(rng, scene, scene.things[0])))
    return f"{main} {verb} {relation} {other}" + _ground(rng, scene, 0.25)


def _relation_photo(scene: Scene, rng: random.Random) -> str:
    main, relation, other = _both(rng, scene)
    return f"{pick(rng, PHOTO)} {main} {relation} {other}" + _ground(rng, scene, 0.15)


def _converse(scene: Scene, rng: random.Random) -> str:
    main, other = scene.things[:2]
    relation = pick(rng, RELATIONS[CONVERSE[scene.relation]])
    verb = pick(rng, ("", f" {_be(other)}"))
    return f"{_phrase(rng, other)}{verb} {relation} {_phrase(rng, main, 0.8)}" + _ground(rng, scene, 0.3)


def _owning(scene: Scene, rng: random.Random) -> str:
    main, other = scene.things[:2]
    said = f"{_phrase(rng, other, 0.9)} with {_phrase(rng, main, 0.9)} {WHERE[scene.relation]}"
    return said + _ground(rng, scene, 0.2)


def _together(scene: Scene, rng: random.Random) -> str:
    main, other = scene.things[:2]
    return f"{_phrase(rng, main)} and {_phrase(rng, other)}" + _ground(rng, scene)


def _main_only(scene: Scene, rng: random.Random) -> str:
    return _phrase(rng, scene.things[0], 1.3) + _ground(rng, scene)


def _other_only(scene: Scene, rng: random.Random) -> str:
    return _phrase(rng, scene.things[1], 1.3) + _ground(rng, scene)


# One object between two others.


def _ends(rng: random.Random, scene: Scene, full: float = 0.6) -> str:
    return " and ".join(_phrase(rng, thing, full) for thing in scene.things[1:])


def _between(scene: Scene, rng: random.Random) -> str:
    return f"{_phrase(rng, scene.things[0], 0.8)} between {_ends(rng, scene)}" + _ground(rng, scene, 0.35)


def _between_existing(scene: Scene, rng: random.Random) -> str:
    verb = pick(rng, ("is", "is placed", _verb(rng, scene, scene.things[0])))
    return f"{_phrase(rng, scene.things[0], 0.8)} {verb} between {_ends(rng, scene)}" + _ground(rng, scene, 0.2)


def _between_photo(scene: Scene, rng: random.Random) -> str:
    return f"{pick(rng, PHOTO)} {_phrase(rng, scene.things[0], 0.7)} between {_ends(rng, scene, 0.5)}"


def _flanked(scene: Scene, rng: random.Random) -> str:
    return f"{_ends(rng, scene)} with {_phrase(rng, scene.things[0], 0.8)} between them" + _ground(rng, scene, 0.2)


def _group(scene: Scene, rng: random.Random) -> str:
    phrases: Sequence[str] = [_phrase(rng, thing, 0.5) for thing in scene.things]
    return " and ".join(phrases) + _ground(rng, scene)
