"""Scenes are the same everywhere, their captions are true of them, and their pictures show what the captions say."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from compress.config import Data
from compress.data import load
from compress.data.pictures import PALETTE, draw
from compress.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, compose
from compress.data.wording import describe
from compress.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
SEED = 17
SCENES = [compose(SEED, number) for number in range(1500)]

# What words mean, written down apart from the grammar that uses them.
SHAPE_WORDS = {
    "circle": "circle", "disc": "circle", "dot": "circle", "square": "square", "box": "square", "block": "square",
    "triangle": "triangle", "star": "star", "ring": "ring", "hoop": "ring", "wheel": "ring", "cross": "cross",
    "sign": "cross", "diamond": "diamond", "kite": "diamond", "heart": "heart", "moon": "moon", "crescent": "moon",
    "arrow": "arrow", "pointer": "arrow", "flower": "flower", "blossom": "flower", "house": "house", "hut": "house",
}
PLURAL_WORDS = {word + "s": shape for word, shape in SHAPE_WORDS.items()} | {"crosses": "cross", "boxes": "square"}
COLOUR_WORDS = {colour: colour for colour in PALETTE} | {
    "golden": "yellow", "violet": "purple", "rose": "pink", "chocolate": "brown", "dark": "black", "pale": "white",
}
TEXTURE_WORDS = {
    "striped": "striped", "stripy": "striped", "stripes": "striped", "dotted": "dotted", "spotted": "dotted",
    "checkered": "checkered", "checked": "checkered", "checks": "checkered",
}
SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
COUNT_WORDS = {"a": 1, "an": 1, "two": 2, "pair": 2, "three": 3, "four": 4}
GROUND_WORDS = {
    "cloudy": "sky", "grass": "grass", "grassy": "grass", "sand": "sand", "sandy": "sand", "night": "night",
    "starry": "night", "brick": "brick", "bricks": "brick", "wooden": "wood", "wood": "wood", "water": "water",
    "snow": "snow", "sunset": "sunset", "evening": "sunset", "gray": "gray",
}
RELATION_WORDS = {
    "above": "above", "over": "above", "below": "below", "under": "below", "beneath": "below", "next": "beside",
    "beside": "beside", "inside": "inside", "within": "inside", "around": "around", "surrounding": "around",
    "overlapping": "front", "behind": "behind", "hidden": "behind",
}


def phrases(caption):
    """Noun phrases as (position of the noun, things it says), read word by word."""
    words, found, said = caption.split(), [], {}
    for at, word in enumerate(words):
        before = words[at - 1] if at else ""
        if word in ("stripes", "checks") or word == "dots" and before == "with":
            found[-1][1]["texture"] = "dotted" if word == "dots" else TEXTURE_WORDS[word]
        elif word in SHAPE_WORDS or word in PLURAL_WORDS:
            said["shape"] = SHAPE_WORDS.get(word) or PLURAL_WORDS[word]
            said["many"] = word in PLURAL_WORDS
            found.append((at, said))
            said = {}
        elif word in COUNT_WORDS and not (word == "a" and words[at + 1 : at + 2] == ["pair"]):
            said = {"count": COUNT_WORDS[word]}
        elif word in COLOUR_WORDS:
            said["colour"] = COLOUR_WORDS[word]
        elif word in TEXTURE_WORDS:
            said["texture"] = TEXTURE_WORDS[word]
        elif word in SIZE_WORDS:
            said["size"] = SIZE_WORDS[word]
    return found


def meant(scene, said):
    """The things of a scene that a noun phrase is true of."""
    return [
        thing
        for thing in scene.things
        if said["shape"] == thing.shape
        and said["many"] == (thing.count > 1)
        and all(said[key] == getattr(thing, key) for key in ("colour", "texture", "size", "count") if key in said)
    ]


def bounds(thing):
    spots = np.array(thing.spots)
    return (spots[:, :2] - spots[:, 2:] / 2).min(0), (spots[:, :2] + spots[:, 2:] / 2).max(0)


def holds(relation, one, other):
    """Whether `one` stands in this relation to `other`, by their places alone; one pixel of 80 may overlap."""
    (low, high), (low2, high2) = bounds(one), bounds(other)
    if relation in ("above", "left"):
        axis = 1 if relation == "above" else 0
        return high[axis] <= low2[axis] + 0.0125
    if relation in ("below", "right"):
        return holds({"below": "above", "right": "left"}[relation], other, one)
    if relation == "beside":
        return holds("left", one, other) or holds("right", one, other)
    if relation == "inside":
        return bool((low > low2).all() and (high < high2).all())
    if relation == "around":
        return holds("inside", other, one)
    overlap = bool((low < high2).all() and (low2 < high).all())
    return overlap if relation in ("front", "behind") else False


def said_relation(words):
    text = " ".join(words)
    if "in front of" in text:
        return "front"
    if "to the left of" in text or "to its left" in text:
        return "left"
    if "to the right of" in text or "to its right" in text:
        return "right"
    return next((RELATION_WORDS[word] for word in words if word in RELATION_WORDS), None)


def test_captions_are_five_different_lower_case_sentences_of_5_to_16_words():
    for scene in SCENES:
        captions = describe(scene, SEED)
        assert len(set(captions)) == 5
        for caption in captions:
            assert 5 <= len(caption.split()) <= 16
            assert caption == " ".join(caption.lower().split()) and caption.replace(" ", "").isalpha()


def test_articles_and_plurals():
    for scene in SCENES:
        for caption in describe(scene, SEED):
            words = caption.split()
            for word, after in zip(words, words[1:], strict=False):
                assert word != "a" or after[0] not in "aeiou", caption
                assert word != "an" or after[0] in "aeiou", caption
                assert (word, after) != ("there", "are") or words[2] in ("two", "three", "four"), caption
            for _, said in phrases(caption):
                assert said["many"] == (said.get("count", 1) > 1), caption


def test_every_noun_phrase_is_true_of_a_thing_in_the_scene():
    said_textures = 0
    for scene in SCENES:
        for caption in describe(scene, SEED):
            found = phrases(caption)
            assert found, caption
            for _, said in found:
                assert meant(scene, said), (caption, scene)
                said_textures += "texture" in said
            shapes = {thing.shape for thing in scene.things}
            colours = {thing.colour for thing in scene.things}
            assert {COLOUR_WORDS[word] for word in caption.split() if word in COLOUR_WORDS} <= colours, caption
            assert {SHAPE_WORDS[word] for word in caption.split() if word in SHAPE_WORDS} <= shapes, caption
    assert said_textures > 500


def test_every_relation_is_true_of_the_places():
    seen = set()
    for scene in SCENES:
        if len(scene.things) != 2 or scene.relation == "between":
            continue
        for caption in describe(scene, SEED):
            found = phrases(caption)
            if len(found) < 2 or " and " in caption:
                continue
            (first, one), (second, other) = found[:2]
            words = caption.split()
            owning = words[second + 1 :] and {"it", "its"} & set(words)
            relation = said_relation(words[second:] if owning else words[first:second])
            assert relation, caption
            things = [thing for thing in scene.things if thing in meant(scene, one)]
            others = [thing for thing in scene.things if thing in meant(scene, other)]
            pairs = [(a, b) for a in things for b in others if a is not b]
            pairs = [(b, a) for a, b in pairs] if owning else pairs
            assert any(holds(relation, a, b) for a, b in pairs), (caption, scene)
            if relation in ("front", "behind"):  # things[0] is drawn last
                in_front = [pair[0] if relation == "front" else pair[1] for pair in pairs]
                assert scene.things[0] in in_front, caption
            seen.add(relation)
    assert seen == {"above", "below", "left", "right", "beside", "inside", "around", "front", "behind"}


def test_what_is_between_lies_between():
    count = 0
    for scene in SCENES:
        if scene.relation != "between":
            assert not any("between" in caption for caption in describe(scene, SEED))
            continue
        ends = np.array([spot[:2] for thing in scene.things[1:] for spot in thing.spots])
        middle = np.array(scene.things[0].spots[0][:2])
        axis = int(np.ptp(ends[:, 1]) > np.ptp(ends[:, 0]))
        assert len(ends) == 2 and ends[:, axis].min() < middle[axis] < ends[:, axis].max()
        for caption in describe(scene, SEED):
            if "between" in caption:
                found = phrases(caption)
                _, said = found[-1] if "between them" in caption else found[0]
                assert scene.things[0] in meant(scene, said), caption
                count += 1
    assert count > 200


def test_backgrounds_places_and_rows_are_true():
    for scene in SCENES:
        spots = np.array([spot[:2] for thing in scene.things for spot in thing.spots])
        for caption in describe(scene, SEED):
            assert {GROUND_WORDS[word] for word in caption.split() if word in GROUND_WORDS} <= {scene.background}
            if "in a row" in caption or "side by side" in caption:
                assert np.ptp(spots[:, 1]) < 0.1 < np.ptp(spots[:, 0]), caption
            if "in a column" in caption or "one above another" in caption:
                assert np.ptp(spots[:, 0]) < 0.1 < np.ptp(spots[:, 1]), caption
            if len(scene.things) == 1 and scene.things[0].count == 1:
                (x, y), half = spots[0], scene.things[0].spots[0][2] / 2
                room = 0.5 - half
                for words, value, side in (("left", x, -1), ("right", x, 1), ("top", y, -1), ("bottom", y, 1)):
                    if words in caption.split():
                        assert side * (value - 0.5) > 0.6 * room, caption


def test_scenes_vary_in_everything_they_promise():
    things = [thing for scene in SCENES for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES) and len(SHAPES) >= 10
    assert {thing.colour for thing in things} == set(COLOURS) == set(PALETTE) and len(COLOURS) == 10
    assert {thing.texture for thing in things} == set(TEXTURES)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    totals = [sum(thing.count for thing in scene.things) for scene in SCENES]
    assert set(totals) == {1, 2, 3, 4}


def test_things_stay_in_the_picture_and_keep_their_distance():
    for scene in SCENES:
        for thing in scene.things:
            low, high = bounds(thing)
            assert low.min() > -0.02 and high.max() < 1.02, scene
            for width in [spot[2] for spot in thing.spots]:
                assert 0.18 < width < 0.6


def test_pictures_show_the_colours_that_captions_name():
    right, count = 0, 0
    for scene in SCENES:
        thing = scene.things[0]
        if thing.texture != "plain" or thing.shape not in ("circle", "square", "triangle", "diamond", "heart", "cross"):
            continue
        picture = draw(scene, SEED, 80).astype(float)
        for x, y, _ in thing.spots:
            row, column = round(y * 80), round(x * 80)
            seen = picture[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
            colours = np.array([PALETTE[name] for name in COLOURS], float)
            light = np.clip((colours @ seen) / (colours**2).sum(1), 0.6, 1.35)[:, None]  # the light is unknown
            nearest = COLOURS[int(((light * colours - seen) ** 2).sum(1).argmin())]
            right, count = right + (nearest == thing.colour), count + 1
    assert count > 300 and right / count > 0.97


def test_pictures_show_textures():
    spread = {texture: [] for texture in TEXTURES}
    for scene in SCENES:
        if len(scene.things) == 1 and scene.things[0].shape in ("circle", "square"):
            thing = scene.things[0]
            x, y, width = thing.spots[0]
            half = round(width * 80 * 0.22)
            rows, columns = (slice(round(at * 80) - half, round(at * 80) + half) for at in (y, x))
            patch = draw(scene, SEED, 80)[rows, columns]
            spread[thing.texture].append(patch.astype(float).std((0, 1)).max())
    assert max(spread["plain"]) < min(spread["striped"] + spread["dotted"] + spread["checkered"])


def test_drawing_is_by_size_and_number_and_in_range():
    for size in (48, 80, 96):
        picture = draw(SCENES[5], SEED, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert (draw(SCENES[5], SEED, 80) == draw(SCENES[5], SEED, 80)).all()
    assert len({hashlib.sha256(draw(scene, SEED, 80).tobytes()).hexdigest() for scene in SCENES[:300]}) == 300


DIGEST = """
import hashlib
from compress.data.pictures import draw
from compress.data.scenes import compose
from compress.data.wording import describe
digest = hashlib.sha256()
for number in range(20):
    scene = compose(3, number)
    digest.update(draw(scene, 3, 80).tobytes())
    digest.update(" ".join(describe(scene, 3)).encode())
print(digest.hexdigest())
"""


def test_two_processes_draw_and_say_the_same():
    def run(hash_seed):
        env = dict(os.environ, PYTHONHASHSEED=hash_seed, PYTHONPATH=str(ROOT))
        return subprocess.run(
            [sys.executable, "-c", DIGEST], env=env, cwd=ROOT, capture_output=True, text=True, check=True
        )

    first, second = run("1").stdout, run("2").stdout
    assert len(first.strip()) == 64 and first == second


def test_load_gives_disjoint_splits_and_pictures():
    scenes = load(Data(train_images=60, val_images=20))
    assert scenes.splits() == {"train": 60, "val": 20, "test": 500}
    assert len({example.image_id for example in scenes.examples}) == 580
    assert scenes.examples[0].image_id == "scene-000000" and scenes.unreadable == ()
    example = scenes.split("val").examples[3]
    assert (scenes.image(example) == draw(compose(17, int(example.image_id[6:])), 17, 80)).all()
    pictures = {
        split: {scenes.image(e).tobytes() for e in scenes.split(split).examples[:60]} for split in scenes.splits()
    }
    assert not pictures["train"] & pictures["val"] and not pictures["train"] & pictures["test"]


def test_more_training_scenes_leave_the_others_as_they_are():
    few, many = load(Data(train_images=10, val_images=5)), load(Data(train_images=30, val_images=8))
    assert few.split("test").examples == many.split("test").examples
    assert many.split("train").examples[:10] == few.split("train").examples
    assert len({few.fingerprint, many.fingerprint}) == 2


def test_another_split_to_measure_on_is_the_same_data():
    """So that nothing is trained anew for it."""
    val, test = (load(Data(train_images=10, val_images=5, val_split=split)) for split in ("val", "test"))
    assert val.splits() == test.splits() == {"train": 10, "val": 5, "test": 500} and val.fingerprint == test.fingerprint


def test_fingerprint_follows_seed_and_size():
    base = Data(train_images=10, val_images=5)
    again = Data(train_images=10, val_images=5, captions=None)
    assert load(base).fingerprint == load(again).fingerprint
    others = [Data(train_images=10, val_images=5, seed=18), Data(train_images=10, val_images=5, image_size=64)]
    assert len({load(data).fingerprint for data in [base, *others]}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 8}, "data.image_size is 8; scenes are 48 to 512 pixels wide: --set data.image_size=80"),
        ({"train_images": 0}, "data.train_images is 0; scenes have 1 to 400,000 train images"),
        ({"val_images": 500_000}, "data.val_images is 500000; scenes have 1 to 400,000 val images"),
    ],
)
def test_impossible_scenes_are_refused(settings, message):
    with pytest.raises(DataError) as error:
        load(Data(**settings))
    assert str(error.value) == message


def test_annotators_agree_as_people_do_and_detail_pays():
    """CIDEr x100 by coco-caption: consensus among the five, none with other scenes, and more for who sees more."""
    rng = random.Random(0)
    scenes = [compose(SEED, 800_000 + number) for number in range(500)]
    captions = [list(describe(scene, SEED)) for scene in scenes]

    def cider(candidates, references):
        keys = range(len(candidates))
        return 100 * Cider().compute_score({k: references[k] for k in keys}, {k: [candidates[k]] for k in keys})[0]

    held = [rng.randrange(5) for _ in scenes]
    one = [five[k] for five, k in zip(captions, held, strict=True)]
    four = [five[:k] + five[k + 1 :] for five, k in zip(captions, held, strict=True)]
    assert 100 < cider(one, four) < 200
    assert cider(one[1:] + one[:1], four) < 25
    numbers = {1: "a", 2: "two", 3: "three", 4: "four"}
    relations = {"left": "to the left of", "right": "to the right of", "front": "in front of"}

    def say(thing, full):
        texture = [thing.texture] if full and thing.texture != "plain" else []
        many = thing.count > 1 and full
        return " ".join([numbers[thing.count if full else 1], *texture, thing.colour, thing.shape + "s" * many])

    def see(scene):
        words = relations.get(scene.relation, scene.relation or "")
        return f"{say(scene.things[0], True)} {words} " + " and ".join(say(thing, True) for thing in scene.things[1:])

    glance = cider([say(scene.things[0], False) for scene in scenes], captions)
    look = cider([see(scene) for scene in scenes], captions)
    assert glance < 100 < 200 < look
