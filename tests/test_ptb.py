"""The tokenizer against the Java program that it stands for: a committed table of its output, and every caption in reach."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from compress.ptb import ptb_tokenize

# Tokens that pycocoevalcap removes; after lower-casing the four brackets never match.
PUNCTUATIONS = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# (text, tokens of Stanford CoreNLP 3.4.1's PTBTokenizer -preserveLines -lowerCase without coco-caption's punctuation)
JAVA_SAID = [
    ("A Dog runs across the lawn.", "a dog runs across the lawn"),
    ("Two kids, one hat , and a kite .", "two kids one hat and a kite"),
    ("She can't see it; he won't look and they're gone.", "she ca n't see it he wo n't look and they 're gone"),
    ("The baker's oven isn't the bakers' oven, it's ours.", "the baker 's oven is n't the bakers oven it 's ours"),
    ("He cannot swim. Cannot? I cannot!", "he can not swim can not i can not"),
    (
        "They're gonna jump, gotta run and wanna play; lemme see, gimme that.",
        "they 're gon na jump got ta run and wan na play lem me see gim me that",
    ),
    ("'Tis a boat and 'twas a ship, y'all.", "'t is a boat and 't was a ship y' all"),
    (
        "A well-known t-shirt on a three-year-old boy - or girl -- or cat --- here.",
        "a well-known t-shirt on a three-year-old boy or girl or cat here",
    ),
    ("A sign (in red) reads [stop] {now}", "a sign -lrb- in red -rrb- reads -lsb- stop -rsb- -lcb- now -rcb-"),
    ("\"Quoted words\" and 'single words' and ``more of them''", "quoted words and single words and more of them"),
    ("Wait... what .... is . . . this?!", "wait what is this ?!"),
    ("Half is 1/2, a cup and 3 1/2 spoons, 1\xbd miles or \xbe of it", "half is 1/2 a cup and 3 1/2 spoons 1 1/2 miles or 3/4 of it"),
    (
        "It costs $5.00, \u20ac5, \xa33, 20\xa2 or US$7 (10% off) for #3",
        "it costs $ 5.00 $ 5 # 3 20 cents or us$ 7 -lrb- 10 % off -rrb- for # 3",
    ),
    ("Salt &amp; pepper, AT&amp;T, R&B and B & B; 3 &lt; 4", "salt & pepper at&t r&b and b & b 3 < 4"),
    ("Black/white and/or b/w photo w/ a frame, he/she/it", "black/white and/or b/w photo w / a frame he/she/it"),
    ("Mr. Oak and Mrs. Elm met Dr. Ash at St. Elmo Ave. in the U.S.", "mr. oak and mrs. elm met dr. ash at st. elmo ave. in the u.s."),
    ("The bus leaves at 5 a.m. and returns at 6 P.M.", "the bus leaves at 5 a.m. and returns at 6 p.m."),
    ("The shop sells shoes, hats, etc.", "the shop sells shoes hats etc."),
    ("The shop sells shoes, etc. The door is open.", "the shop sells shoes etc. the door is open"),
    ("A map of the U.S. The flag is red.", "a map of the u.s. the flag is red"),
    ("This is plan B. The other is plan C.", "this is plan b the other is plan c."),
    (
        "1,000 people ran 3.5 miles at 10:30 in -5 degrees, +5 tomorrow, on 12/25/2010",
        "1,000 people ran 3.5 miles at 10:30 in -5 degrees +5 tomorrow on 12/25/2010",
    ),
    (
        "A caf\xe9 with na\xefve \u201ccurly quotes\u201d and \u2018single ones\u2019; it\u2019s open, don\u2019t \u2013 or later\u2026",
        "a caf\xe9 with na\xefve curly quotes and single ones it 's open do n't or later",
    ),
    (
        "The '90s car, a 70's bus and the 1980s train, 3rd of 5 O'Hara's at five o'clock",
        "the '90s car a 70 's bus and the 1980s train 3rd of 5 o'hara 's at five o'clock",
    ),
    ("Ma'am, rock 'n' roll, c'mon, ol' friend, jus' dancin' with 'em", "ma'am rock 'n' roll c'mon ol' friend jus dancin with 'em"),
    ("Player no. 7 said no. Then he left, no.", "player no. 7 said no then he left no"),
    (
        "Write to ann@example.com or see www.example.com and http://example.org/a-b now",
        "write to ann@example.com or see www.example.com and http://example.org/a-b now",
    ),
    ("#sunset with @friend_1 :) and :-( or ;D", "#sunset with @friend_1 :-rrb- and :--lrb- or ;d"),
    ("An emoji \U0001f600 between words, a\U0001f600b, and \u4e2d\u6587", "an emoji between words a b and \u4e2d\u6587"),
    ("under_score a_b *star* ** \\ back | ~ ^ = +", "under_score a_b * star * ** \\ back | ~ ^ = +"),
    ("<b>bold</b> text <br/> and a <3 heart", "<b> bold </b> text <br/> and a < 3 heart"),
    ("The end.The next sentence,and more:here;there!yes", "the end.the next sentence and more here there!yes"),
    ("Jr. and Sr. on Jan. 5 or later, not now", "jr. and sr. on jan. 5 or later not now"),
    ("the ex. of wash.", "the ex of wash"),
    ("photo.jpg next to song.mp3, ph.d. in art", "photo.jpg next to song.mp3 ph.d. in art"),
    ("Call 555-1234 or 1-800-555-1234", "call 555-1234 or 1-800-555-1234"),
    ("A U.S.-based team and a non-U.S. one, the car.; a dog.,", "a u.s.-based team and a non-u.s. one the car. a dog."),
    ("Rock'n'roll till 3:15pm, 80mph, 3.5cm", "rock 'n' roll till 3:15 pm 80mph 3.5 cm"),
    ("Plan B. Two dogs, plan C. One dog", "plan b. two dogs plan c one dog"),
    ("grey colour theatre and neighbour's organised centre", "grey colour theatre and neighbour 's organised centre"),
    ("A\ttab and\xa0a hard space", "a tab and a hard space"),
    ("dog's.", "dog 's"),
    ("a", "a"),
    ("?", ""),
    ("", ""),
    ("DON'T STOP, IT'S THE DOG'S BALL", "do n't stop it 's the dog 's ball"),
    ("a slip 'n slide and a slip n 'slide", "a slip 'n slide and a slip n slide"),
    ("A 6'2\" man in a size-12 boot, 20ft tall, at 5pm", "a 6 2 man in a size-12 boot 20ft tall at 5pm"),
]
DATA = Path(os.environ.get("LIGHTCAP_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


@pytest.mark.parametrize(("text", "expected"), JAVA_SAID)
def test_tokens_are_those_that_the_java_tokenizer_printed(text, expected):
    assert ptb_tokenize(text) == expected.split()


def test_the_short_way_and_the_rules_agree():
    from compress import ptb

    words = "a The dog CAT etc mr b no cannot Gonna two Wash inline i Jr bird jan".split()
    draw = random.Random(5)
    plain = 0
    for _ in range(3000):
        pieces = [draw.choice(words) + draw.choice(["", "", "", ",", " ,"]) for _ in range(draw.randint(1, 8))]
        text = " ".join(pieces) + draw.choice(["", ".", " .", ". "])
        plain += ptb._PLAIN(text) is not None
        assert ptb_tokenize(text) == ptb._lex(text), text
    assert plain > 2500  # most of them looked plain


def test_line_breaks_are_spaces_and_nothing_is_empty():
    assert ptb_tokenize("one dog\nand two\u2028cats\r\n") == "one dog and two cats".split()
    assert ptb_tokenize("") == ptb_tokenize(" ... , - ") == []


def mixtures(joins: list[str], count: int) -> list[str]:
    """Pieces of the own sentences in any order, with a short sentence after each, as Java looks past the end of a line."""
    pieces = [piece for text, _ in JAVA_SAID for piece in text.split()]
    draw = random.Random(11)
    mixed = ["".join(draw.choice(pieces) + draw.choice(joins) for _ in range(draw.randint(2, 6))) for _ in range(count)]
    return [text for sentence in mixed for text in (sentence, "between")]


def captions_in_reach() -> list[str]:
    """Own sentences, mixtures of their pieces with spaces between, and the captions of the shared data where it is present."""
    captions = [text for sentence, _ in JAVA_SAID for text in (sentence, "between")] + mixtures([" "], 3000)
    karpathy, coco = DATA / "flickr8k" / "dataset_flickr8k.json", DATA / "coco_mini" / "captions_train2017.json"
    if karpathy.is_file():
        images = json.loads(karpathy.read_text(encoding="utf-8"))["images"]
        captions += [sentence["raw"] for image in images for sentence in image["sentences"]]
    if coco.is_file():
        captions += [annotation["caption"] for annotation in json.loads(coco.read_text(encoding="utf-8"))["annotations"]]
    return captions


def java_tokens(captions: list[str], jar: Path, folder: Path) -> list[list[str]]:
    """Tokens as pycocoevalcap gets them: the same command line on a file with a caption per line."""
    text = folder / "captions.txt"
    text.write_bytes("\n".join(caption.replace("\n", " ") for caption in captions).encode())
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = subprocess.run([*command, str(text)], capture_output=True, check=True, timeout=120).stdout.decode().split("\n")
    kept = [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATIONS).split() for line in lines]
    return kept[: len(captions)]


def test_every_caption_in_reach_gets_the_tokens_of_the_java_tokenizer(tmp_path):
    import importlib.util

    captions = captions_in_reach()
    spec = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None or spec is None:
        # Without Java there is only the table above to hold on to; here at least: tokens are clean and stay what they are.
        for caption in captions:
            tokens = ptb_tokenize(caption)
            assert all(token and token not in PUNCTUATIONS and token == token.lower() and len(token.split()) == 1 for token in tokens)
        return
    jar = Path(spec.submodule_search_locations[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    run_together = mixtures([" ", " ", " ", ""], 2000)  # stranger than captions; the module says that some of these differ
    java = java_tokens(captions + run_together, jar, tmp_path)
    assert len(java) == len(captions) + len(run_together)
    different = [
        (caption, theirs, ptb_tokenize(caption))
        for caption, theirs in zip(captions, java[: len(captions)], strict=True)
        if theirs != ptb_tokenize(caption)
    ]
    assert not different, f"{len(different)} of {len(captions)}: {different[:5]}"
    agree = sum(theirs == ptb_tokenize(text) for text, theirs in zip(run_together[::2], java[len(captions) :: 2], strict=True))
    assert agree > 0.9 * 2000
