"""The shipped list of concepts, the reader of one's own, and which concepts captions mention; forms are compared with hand-written ones."""

import re

import pytest

from compress.data.concepts import SHIPPED, Mentions, base_form, is_action, read_concepts
from compress.errors import DataError

COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,"
    "horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")


@pytest.fixture(scope="module")
def shipped():
    """What a caption mentions, by name, with the shipped list."""
    concepts = read_concepts()
    mentions = Mentions(concepts)
    return lambda caption: {concepts[number] for number in mentions.mentioned(caption)}


def small(*concepts):
    mentions = Mentions(concepts)
    return lambda caption: {concepts[number] for number in mentions.mentioned(caption)}


# The shipped list.


def test_shipped_list():
    concepts = read_concepts()
    assert 700 <= len(concepts) <= 1000 and len(set(concepts)) == len(concepts)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)?( [a-z]+){0,3}", concept) for concept in concepts)
    mentions = Mentions(concepts)
    assert [mentions.mentioned(concept) >= {number} for number, concept in enumerate(concepts)] == [True] * len(concepts)
    text = SHIPPED.read_text(encoding="utf-8")
    looks = text.split("# Colours, materials and looks\n")[1].split("\n\n")[0].split()
    assert "red" in looks and "wooden" in looks and len(looks) <= 30


def test_every_coco_category_has_its_entry():
    concepts = read_concepts()
    mentions = Mentions(concepts)
    assert len(COCO) == 80
    assert {name: concepts[mentions.named(name)] for name in COCO} == {name: name for name in COCO} | {"skis": "ski"}


def test_every_action_on_the_list_has_the_base_form_a_person_wrote_down():
    wrote = """
    run walk jog jump leap climb hike crawl march swim dive wade splash surf sail row paddle kayak raft fish wakeboard ski
    snowboard skateboard skate sled ride cycle race drive park fly land float fall slide swing roll spin flip sit stand kneel
    crouch squat bend lie lean rest relax sleep lounge hang hide balance pose stretch reach point wave clap cheer celebrate
    yell laugh smile cry sing dance perform play talk listen read write draw type look watch stare eat drink feed bite chew
    lick kiss hug pet hold carry lift pull push throw toss catch hit kick dribble bounce juggle bowl wrestle fight box tackle
    chase bark sniff dig shake graze cut cook pour blow clean wash bathe work shop wait prepare camp gather smoke shoot
    """.split()
    assert sorted(base_form(concept) for concept in read_concepts() if is_action(concept)) == sorted(wrote)


@pytest.mark.parametrize(
    ("verb", "base"),
    [
        ("trotting", "trot"), ("adding", "add"), ("picnicking", "picnic"), ("patrolling", "patrol"), ("selling", "sell"),
        ("buzzing", "buzz"), ("decorating", "decorate"), ("opening", "open"), ("wandering", "wander"), ("exploring", "explore"),
        ("rescuing", "rescue"), ("canoeing", "canoe"), ("judging", "judge"), ("hurdling", "hurdle"), ("growling", "growl"),
        ("mixing", "mix"), ("dying", "die"), ("squeezing", "squeeze"), ("crossing", "cross"), ("raising", "raise"),
        ("dividing", "divide"), ("sprinkling", "sprinkle"),
    ],
)
def test_base_forms_of_other_verbs(verb, base):
    assert base_form(verb) == base


def test_things_in_ing_are_no_actions():
    assert not any(map(is_action, "building wedding ceiling painting king ring wing swing string earring railing sling".split()))
    assert all(map(is_action, "running skiing lying dying cutting playing guitar-playing".split()))


# Word forms.


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two women and three children feed geese .", "woman child feeding goose"),
        ("People with mice, wolves, and sheep", "person mouse wolf sheep"),
        ("Firefighters' boots on the men's feet", "firefighter boot man foot"),
        ("knives, leaves, shelves, scarves and teeth", "knife leaf shelf scarf tooth"),
        ("policemen near two buses, benches, cherries and potatoes", "policeman bus bench cherry potato"),
        ("A man ran, swam and threw", "man running swimming throwing"),
        ("He rode, she has ridden, it rides; riding", "riding"),
        ("It hopped off and jogged past", "jogging"),
        ("A dog lies, another lay, a third is laying", "dog lying"),
        ("two friends carried and were carrying", "friend carrying"),
        ("sat, stood, slept, ate, drank, fell", "sitting standing sleeping eating drinking falling"),
        ("hugged and hugging, smiled and smiling", "hugging smiling"),
        ("A close-up shot of a row of boats, a bit blue", "boat blue"),
        ("He rowed and shoots; rowing", "rowing shooting"),
        ("A GRAY cat and a grey one", "gray cat"),
        ("A doughnut, a racquet, a blond wig", "donut racket blonde"),
        ("the thing is that of which we know nothing", ""),
        ("", ""),
    ],
)
def test_forms(shipped, caption, expected):
    assert shipped(caption) == set(expected.split())


def test_longest_form_wins_and_its_last_word_counts(shipped):
    assert shipped("kicking soccer balls") == {"kicking", "soccer ball", "ball"}
    assert shipped("soccer with a ball") == {"soccer", "ball"}
    assert shipped("red wine glasses") == {"red", "wine glass", "glass"}
    assert shipped("a person in glasses") == {"person", "glasses"}
    assert shipped("the swimming pool") == {"swimming pool", "pool"}
    assert shipped("a ski lift") == {"ski lift"}
    assert shipped("hot dogs and an ice cream cone") == {"hot dog", "ice cream cone", "cone"}
    assert shipped("teddy bears") == {"teddy bear"}
    by_words = small("fire", "red fire truck", "fire truck", "truck", "truck stop")
    assert by_words("a red fire truck stop") == {"red fire truck", "fire truck", "truck"}
    assert by_words("a fire truck stop") == {"fire truck", "truck"}
    assert by_words("fire at the truck stops") == {"fire", "truck stop"}
    assert by_words("the red fire") == {"fire"}


def test_hyphens_and_words_written_as_one(shipped):
    for caption in ("t-shirts", "a T-shirt", "a t shirt", "tshirt", "tee-shirt"):
        assert {"t-shirt"} <= shipped(caption) <= {"t-shirt", "shirt"}, caption
    assert shipped("a snow-covered hill") == {"snow", "hill"}
    assert shipped("black/white cat") == {"black", "white", "cat"}
    assert shipped("hotdog") == {"hot dog"}


def test_one_form_is_one_concept_own_name_first_then_plural_then_verb():
    assert small("skiing", "ski")("skis") == {"ski"}
    assert small("skiing")("skis") == {"skiing"}
    assert small("waving", "wave")("she waves , waving") == {"wave", "waving"}
    assert small("glass", "glasses")("glasses") == {"glasses"}
    assert small("dog", "dogs")("a dog and dogs") == {"dog", "dogs"}
    assert small("park", "parking")("parked near a park") == {"park", "parking"}


def test_a_user_list_in_another_order_gives_its_numbers():
    mentions = Mentions(("run away", "playing guitar", "Golden Retriever"))
    assert mentions.mentioned("golden retrievers play guitar") == {2}
    assert mentions.mentioned("he is playing guitar") == frozenset([1])


def test_names_of_objects():
    concepts = ("tree", "trunk", "man", "edge", "hot dog", "table")
    named = Mentions(concepts).named
    names = ["Tree", "trees", "tree trunk", "young men", "man's table", "hot dog", "edge of table", "edge of", "chair", "", "hot-dog"]
    expected = [0, 0, 1, 2, 5, 4, None, None, None, None, 4]
    assert [named(name) for name in names] == expected


# Lists of one's own.


def wrong(path):
    with pytest.raises(DataError) as error:
        read_concepts(path)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_list_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff# mine\n\nTraffic   Light  # with a comment\n dog\ncafé\n", encoding="utf-8")
    assert read_concepts(path) == read_concepts(str(path)) == ("traffic light", "dog", "café")
    assert Mentions(read_concepts(path)).mentioned("Cafés with traffic lights") == {0, 2}


def test_wrong_lists_say_where_and_how_to_mend(tmp_path):
    path = tmp_path / "mine.txt"
    assert wrong(path) == f"there is no list of concepts {path}: write one, a concept a line, or leave it out for the shipped list"
    assert wrong(tmp_path).startswith(f"{tmp_path} cannot be read: Is a directory; ")
    for content, message in (
        (b"", f"{path} holds no concepts: write one a line, or leave it out for the shipped list"),
        (b"# only\n\n", f"{path} holds no concepts: write one a line, or leave it out for the shipped list"),
        (b"dog\ncaf\xe9\n", f"{path} is no UTF-8 text (byte 7); a list of concepts is: save it so, a concept a line"),
        (b"dog\n\ncat\nDog\n", f"{path}:4: 'dog' stands already on line 1; remove one of the two"),
        (b"t-shirt\nt shirt\n", f"{path}:2: 't shirt' stands already on line 1; remove one of the two"),
        (b"dog\n" + b"ab " * 14, f"{path}:2: '{'ab ' * 13}a...' has 41 characters; a concept has 40 at most, one a line"),
        (b'["dog", "cat"]', f"{path}:1: '[\"dog\", \"cat\"]' is no concept: letters, digits, spaces and hyphens, one concept a line"),
        (b"dog\n---\n", f"{path}:2: '---' is no concept: letters, digits, spaces and hyphens, one concept a line"),
    ):
        path.write_bytes(content)
        assert wrong(path) == message
    path.write_text("a" * 40)
    assert read_concepts(path) == ("a" * 40,)
