"""The concept extractor's vocabulary, and which of its concepts a caption mentions or an object's name stands for.

`concepts.txt` beside this file is the shipped list; a list of one's own has the same form: one concept a line, things in the singular,
actions in their -ing form ("running"), `#` starts a comment. Word forms are looked up in one dictionary from every form of every
concept to its number:

- things: singular and plural (women, leaves, mice), two words also written as one or with a hyphen ("hotdog", "t-shirt");
- actions: "run", "runs", "running", "ran"; the base form comes from the -ing form by the rules of English spelling;
- one form, one concept: a concept's own name comes first, then plurals, then verb forms, then the order of the list. So "waves" is
  the sea's, and with both "ski" and "skiing" on the list "skis" are the thing;
- the longest form wins, and what it ends in counts too: "a soccer ball" mentions "soccer ball" and "ball", but not "soccer"; and since
  a hot dog is no dog, the phrases of `NOT_WHAT_THEY_END_IN` count for themselves alone.

Nothing here knows parts of speech: "a man parks his car" mentions a park.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.errors import DataError
from compress.ptb import ptb_tokenize

SHIPPED = Path(__file__).with_name("concepts.txt")
LONGEST = 40  # characters of a concept; a longer line is most likely not a list of concepts

PLURALS = {
    "person": ("people", "persons"), "child": ("children",), "foot": ("feet",), "tooth": ("teeth",), "goose": ("geese",),
    "mouse": ("mice",), "ox": ("oxen",), "die": ("dice",), "leaf": ("leaves",), "knife": ("knives",), "wife": ("wives",),
    "life": ("lives",), "wolf": ("wolves",), "calf": ("calves",), "half": ("halves",), "shelf": ("shelves",),
    "bookshelf": ("bookshelves",), "elf": ("elves",), "loaf": ("loaves",), "thief": ("thieves",), "scarf": ("scarves", "scarfs"),
    "hoof": ("hooves", "hoofs"), "cactus": ("cacti", "cactuses"), "stomach": ("stomachs",), "bus": ("buses", "busses"),
    "fish": ("fish", "fishes"), "sheep": ("sheep",), "deer": ("deer", "deers"), "moose": ("moose",),
}
NOT_MEN = frozenset("human german roman talisman ottoman caiman".split())

# Other spellings (and, of a few, another form of the word) of a concept, or of the last word of one.
SPELLINGS = {
    "gray": ("grey",), "blonde": ("blond",), "gold": ("golden",), "colorful": ("colourful",), "barefoot": ("barefooted",),
    "donut": ("doughnut",), "tire": ("tyre",), "racket": ("racquet",), "airplane": ("aeroplane",), "theater": ("theatre",),
    "mustache": ("moustache",), "pajamas": ("pyjamas",), "drier": ("dryer",), "t shirt": ("tee shirt",), "neighborhood": ("neighbourhood",),
    "wooden": ("wood",), "clothes": ("clothing",),
}

# Verb forms that mostly mean something else in captions: in a row, a type of, a bit, a close-up shot. They mention no action.
OTHER_SENSES = frozenset("row rows type types bit shot shots".split())

# Past forms, by -ing form.
PAST = {
    "bending": ("bent",), "biting": ("bit", "bitten"), "blowing": ("blew", "blown"),
    "breaking": ("broke", "broken"), "bringing": ("brought",),
    "catching": ("caught",), "cutting": ("cut",), "digging": ("dug",), "drawing": ("drew", "drawn"), "drinking": ("drank", "drunk"),
    "driving": ("drove", "driven"), "eating": ("ate", "eaten"), "falling": ("fell", "fallen"), "feeding": ("fed",),
    "fighting": ("fought",), "flying": ("flew", "flown"), "giving": ("gave", "given"), "going": ("went", "gone"),
    "hanging": ("hung", "hanged"), "hiding": ("hid", "hidden"), "hitting": ("hit",), "holding": ("held",),
    "kneeling": ("knelt", "kneeled"), "leaning": ("leaned", "leant"), "leaping": ("leapt", "leaped"),
    "lying": ("lay", "lain", "lays", "laying", "laid"),  # captions say "a dog laying on the grass" of a dog that lies there
    "making": ("made",), "reading": ("read",), "riding": ("rode", "ridden"), "rising": ("rose", "risen"), "running": ("ran",),
    "shaking": ("shook", "shaken"), "shooting": ("shot",), "singing": ("sang", "sung"), "sitting": ("sat",), "sleeping": ("slept",),
    "sliding": ("slid",), "speaking": ("spoke", "spoken"), "spinning": ("spun",), "standing": ("stood",), "sweeping": ("swept",),
    "swimming": ("swam", "swum"), "swinging": ("swung",), "taking": ("took", "taken"), "throwing": ("threw", "thrown"),
    "wearing": ("wore", "worn"), "winding": ("wound",), "writing": ("wrote", "written"),
}

# Base forms, by -ing form, that the rules of `base_form` miss.
BASES = {
    "lying": "lie", "tying": "tie", "dying": "die", "picnicking": "picnic", "frolicking": "frolic", "bathing": "bathe",
    "sunbathing": "sunbathe", "breathing": "breathe", "tasting": "taste", "pasting": "paste", "lounging": "lounge", "plunging": "plunge",
    "changing": "change", "arranging": "arrange", "guiding": "guide", "competing": "compete", "adding": "add",
    "focusing": "focus", "kayaking": "kayak",
}

# Things whose name ends in -ing; with those that have no other vowel (king, ring, string) all that are not actions.
THINGS_IN_ING = frozenset(
    "building ceiling wedding painting clothing icing frosting pudding stuffing dressing awning railing paving lightning earring evening "
    "morning scaffolding drawstring shoestring shopping-bag crossing sibling duckling gosling dumpling viking".split()
)

# Phrases that are not a kind of what their last word names.
NOT_WHAT_THEY_END_IN = frozenset(
    ["hot dog", "prairie dog", "guinea pig", "sea lion", "sea horse", "ice cream", "teddy bear", "stuffed animal", "jet ski"]
    + ["bathing suit"]
)
PREPOSITIONS = frozenset("of in on at with by from for to and".split())


def default_text_encoder(image_encoder: str) -> str:
    """CLIP's text encoder for CLIP's images, else MiniLM."""
    return "openai" if image_encoder == "clip-rn50" else "minilm"


def read_concepts(path: str | Path | None = None) -> tuple[str, ...]:
    """The concepts of a file, or of the shipped list, in the file's order, in lower case.

    Raises DataError, with the file and the line, for a file that cannot be read, that is no UTF-8 text or holds no concept, for a line of
    more than LONGEST characters or with other characters than letters, digits, spaces, hyphens and apostrophes, and for a concept that
    stands there twice ("t-shirt" and "t shirt" are one).
    """
    path = SHIPPED if path is None else Path(os.path.expanduser(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no list of concepts {path}: write one, a concept a line, or leave it out for the shipped list") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}); a list of concepts is: save it so, a concept a line") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; a list of concepts is a text file with a concept a line") from None
    concepts: list[str] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        concept = " ".join(line.partition("#")[0].lower().split())
        if not concept:
            continue
        if len(concept) > LONGEST:
            raise DataError(
                f"{path}:{number}: '{concept[:LONGEST]}...' has {len(concept)} characters; a concept has {LONGEST} at most, one a line"
            )
        key = " ".join(words(concept))
        if not key or re.search(r"[^\w '-]", concept):
            raise DataError(f"{path}:{number}: '{concept}' is no concept: letters, digits, spaces and hyphens, one concept a line")
        if key in lines:
            raise DataError(f"{path}:{number}: '{concept}' stands already on line {lines[key]}; remove one of the two")
        lines[key] = number
        concepts.append(concept)
    if not concepts:
        raise DataError(f"{path} holds no concepts: write one a line, or leave it out for the shipped list")
    return tuple(concepts)


def words(text: str) -> list[str]:
    """The PTB tokens of a text in lower case, those with hyphens and slashes divided there."""
    tokens = ptb_tokenize(text)
    if "-" in text or "/" in text:
        return " ".join(tokens).replace("-", " ").replace("/", " ").split()
    return tokens


class Mentions:
    """Finds the concepts of a list in captions. Concepts are named by their place in it, from 0."""

    def __init__(self, concepts: Sequence[str]) -> None:
        names = [" ".join(words(concept)) for concept in concepts]
        found = {name: number for number, name in enumerate(names)}
        for number, name in enumerate(names):
            for form in _plural_forms(name):
                found.setdefault(form, number)
        meant = [(number, *_ends(name, found)) for number, name in enumerate(names)]  # before the verbs: a ski lift lifts nothing
        for number, name in enumerate(names):
            for form in _verb_forms(name):
                found.setdefault(form, number)
        self._mentioned = {form: meant[number] for form, number in found.items()}
        self._longest: dict[str, int] = {}  # first word of a form -> the most words that a form which begins with it has
        for form in found:
            first, *rest = form.split()
            self._longest[first] = max(self._longest.get(first, 0), 1 + len(rest))

    def mentioned(self, caption: str) -> frozenset[int]:
        """The numbers of the concepts that a caption mentions."""
        said = words(caption)
        found: list[int] = []
        start = 0
        while start < len(said):
            for length in range(min(self._longest.get(said[start], 0), len(said) - start), 0, -1):
                numbers = self._mentioned.get(said[start] if length == 1 else " ".join(said[start : start + length]))
                if numbers:
                    found.extend(numbers)
                    start += length
                    break
            else:
                start += 1
        return frozenset(found)

    def named(self, name: str) -> int | None:
        """The concept that the name of an object stands for, or None.

        That is the longest form that the name ends in: "young men" are a man, "a tree trunk" is a trunk. A name with a preposition
        ("edge of table") must be a form as a whole.
        """
        said = words(name)
        whole = any(word in PREPOSITIONS for word in said)
        for start in range(min(1, len(said)) if whole else len(said)):
            if numbers := self._mentioned.get(" ".join(said[start:])):
                return numbers[0]
        return None


def _ends(name: str, found: dict[str, int]) -> Iterator[int]:
    """The concepts that a phrase ends in: of "baseball cap" that is "cap"."""
    parts = name.split()
    if name not in NOT_WHAT_THEY_END_IN:
        yield from (found[end] for start in range(1, len(parts)) if (end := " ".join(parts[start:])) in found)


def is_action(concept: str) -> bool:
    """Whether a concept counts as a verb: its last word ends in -ing, has a vowel before that, and is no thing (building, string)."""
    last = concept.split()[-1]
    return last.endswith("ing") and re.search("[aeiouy]", last[:-3]) is not None and last not in THINGS_IN_ING


def base_form(verb: str) -> str:
    """The base form of a verb in -ing: running to run, riding to ride, falling to fall, carrying to carry."""
    if verb in BASES:
        return BASES[verb]
    stem = verb.removesuffix("ing")
    vowels = re.findall("[aeiouy]+", stem)
    if re.search(r"([bdgkmnprt])\1$", stem) or (re.search("[aeiou]ll$", stem) and len(vowels) > 1):
        return stem[:-1]  # running, trekking, patrolling; but kissing, falling, sniffing
    if re.search(r"[cvu]$|[^s]s$|[^z]z$|dg$|rg$|[bcdfgkptz]l$|st?l$", stem):
        return stem + "e"  # dancing, gazing, waving, rescuing, posing, judging, juggling, wrestling
    if re.search("(^|[^aeiou])[aeiouy][^aeiouywx]$", stem) and len(vowels) == 1:
        return stem + "e"  # riding: a short vowel would have doubled the consonant, as in ridding
    if re.search("[^aeiou](at|ir|ar|or|ur|ag|id|ut)$", stem) and len(vowels) > 1:
        return stem + "e"  # celebrating, preparing; but opening, gathering
    return stem


def _plurals(noun: str) -> tuple[str, ...]:
    """The plurals of a noun, or of the last word of a phrase."""
    before, space, last = noun.rpartition(" ")
    if last in PLURALS:
        found: tuple[str, ...] = PLURALS[last]
    elif last.endswith("man") and last not in NOT_MEN:
        found = (last[:-2] + "en",)
    elif re.search("(s|x|z|ch|sh)$", last):
        found = (last + "es",)
    elif re.search("[^aeiou]y$", last):
        found = (last[:-1] + "ies",)
    elif last.endswith("o"):
        found = (last + "s", last + "es")
    else:
        found = (last + "s",)
    return tuple(before + space + form for form in found)


def _plural_forms(concept: str) -> Iterator[str]:
    """Plurals and other spellings of a thing; other spellings of an action."""
    before, space, last = concept.rpartition(" ")
    spellings = [concept, *SPELLINGS.get(concept, ())]
    if space:
        spellings += [f"{before} {other}" for other in SPELLINGS.get(last, ())]
    if concept.count(" ") == 1:
        spellings.append(concept.replace(" ", ""))
    for spelling in spellings:
        yield spelling
        if not is_action(concept):
            yield from _plurals(spelling)


def _verb_forms(concept: str) -> Iterator[str]:
    """The inflections of an action; of a phrase those of its last word."""
    if not is_action(concept):
        return
    before, space, last = concept.rpartition(" ")
    base = base_form(last)
    stem = last.removesuffix("ing")
    regular = base + "d" if base.endswith("e") else re.sub("([^aeiou])y$", r"\1i", stem) + "ed"
    for form in {base, *_plurals(base), *PAST.get(last, (regular,))} - OTHER_SENSES:
        yield before + space + form
