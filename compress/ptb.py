r"""The tokens that coco-caption counts, without Java.

`ptb_tokenize` gives the tokens of Stanford's PTBTokenizer, called as pycocoevalcap calls it (`-preserveLines -lowerCase`, CoreNLP
3.4.1) and without the tokens on pycocoevalcap's punctuation list. That list is compared after lower-casing, so that brackets stay,
as -lrb- and -rrb-; published scores have them, and so has this.

The rules here follow the conventions of the Penn Treebank and the program's observed output; they were written without its source.
tests/test_ptb.py compares them with a committed table of the program's output and, where Java and the data are present, with the
program itself on every caption of Flickr8k and of the COCO excerpt, which must all agree.

What is known to differ, all of it rare in captions:

- Abbreviations: a full stop stays on those of `ABBREVIATIONS` only. The program knows more, among them those of US states
  ("Calif.", and "Wash." where it is capitalized), "Messrs.", "op. 5".
- A lone letter at the end of a caption ("plan B.") keeps its full stop; the program looks at the next line of the file, and takes the
  full stop away where that line begins with a word such as "The". Fewer of such words are known here.
- Telephone numbers with brackets, smileys such as ^_^ or -_-, names such as c++ and C#, and apostrophes in rare elisions (s'mores,
  ne'er, qu'on, more'n).
- Accents written as characters of their own, soft hyphens and the rarer symbols outside Latin-1.
- Pieces run together without spaces ("it'splay", "athttp://example.org", "80m.p.h."): about one in thirty mixtures of that kind in
  the tests differs.
"""

from __future__ import annotations

import re

# Words that keep their full stop wherever they stand.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr jr sr prof rev gen col capt sgt lt gov st ave rd blvd mt ft dept est tel inc co corp ltd bros etc vs ph.d "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri".split()
)

# Capitalized after "plan B.", these begin a sentence, and the full stop is not the letter's.
SENTENCE_STARTERS = "a an the he she it they we you in at this that these there here one some many when while after then".split()

# Words written as one that count as two.
TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me"}

# Replacements within the tokens found: brackets and currencies have names, typographic apostrophes are plain ones.
NAMES = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
    | {"¢": "cents", "£": "#", "€": "$", "¤": "$", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
    | {character: f" {character} " for character in "¹²³"}
)
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}

_RULES = {
    # http://example.org/a-b, www.example.com and ann@example.com, without the full stop of the sentence
    "address": r"https?://[^\s\"<>()]*[\w/]|www\.[\w.-]*\w|[\w.+-]*\w@\w(?:[\w.-]*\w)?",
    "tag": r"</?[A-Za-z][^<>]*>|&\#\d+;",
    # :) ;-) =( :D, but not the colon of "here:dog"
    "smiley": r"[:;=]['-]?[()DPdpO3|](?!\w)",
    # @friend_1 and #sunset; "#5" is "#" and a number
    "handle": r"@[A-Za-z]\w*|\#[A-Za-z]+",
    # 's 'm 'd 're 've 'll and n't, also by themselves, as captions are often written with a space before them
    "contraction": r"'(?i:[smd]|re|ve|ll)(?!\w)|(?i:n['`]t)(?!\w)",
    # 'n' and 'em keep their apostrophe, 'tis is 't is, and decades are '90s
    "clipped": r"'(?i:n'|(?:n|em|till?|cause)(?![\w'])|t(?=(?:is|was)(?!\w)))|'\d\ds(?!\w)",
    # a.m. and S.C.U.B.A., U.S.-based and non-U.S.
    "acronym": r"(?:[^\W\d_]+-)*(?:[A-Za-z]\.){2,}(?:-[^\W_]+)*(?!\w)",
    "abbreviation": rf"(?i:{'|'.join(map(re.escape, sorted(ABBREVIATIONS, key=len, reverse=True)))})\.(?!\w)",
    # "no. 7" is a number, and "no." otherwise an answer
    "number": r"(?i:no)\.(?=\s*\d)",
    # "plan B. or", but not "plan B. The dog", nor before a tag
    "initial": rf"[A-Za-z]\.(?!\w|\s+(?=[A-Z])(?i:{'|'.join(SENTENCE_STARTERS)})(?!\S)|\s*</?[A-Za-z])",
    # do|n't; a word with a hyphen before it stays whole
    "negated": r"[^\W\d_]+?(?=(?i:n['`]t)(?!\w))",
    # AT&T, but at & t; US$
    "company": r"[A-Z]+(?:&[A-Z]+)+|(?:US|[AC])\$",
    # o'clock, D'Angelo, ma'am; y' and ol' keep their apostrophe
    "elided": r"(?i:[odln]'[^\W\d_]{2,}|ma'am|c'mon|ol'|y'(?=all(?!\w)))",
    # photo.jpg, and the end.The next
    "joined": r"[^\W\d_]+(?:[.!?][^\W\d_][^\W_]*)+(?:-[^\W_]+)*",
    # 1,000 3.5 10:30 12.25.2010 -5 +5 .5
    "figure": r"[-+]?\d*(?:[.,:]\d+)+|(?<![\w-])-\d+(?![\w/-])|\+\d+",
    # words, with hyphens, slashes and underscores between their parts: t-shirt, and/or, 1/2; before one of ,;: also its full stop
    "word": r"[^\W_]+(?:[-/_‐][^\W_]+)*(?:\.(?=[,;:]))?",
    # "?!" stays where "?" and "!" go
    "marks": r"[?!]{2,}",
    "symbol": r"[*]+|_+|\#+|<<|>>|[()\[\]{}$%&@+/\\|~^=<>]|[¡-©¬®-¸¿×÷‚„†-‣‰-‸€℀-⅏←-⯿]",
}
_TOKEN = re.compile("|".join(_RULES.values())).findall

# Most captions are letters and commas, with a full stop at the end at most; they need none of the rules.
_PLAIN = re.compile(r"[A-Za-z, ]*\.?\s*").fullmatch


def ptb_tokenize(text: str) -> list[str]:
    """The lower-case tokens of a caption, punctuation removed; line breaks count as spaces."""
    if _PLAIN(text):
        words = text.replace(",", " ").lower().split()
        if words and words[-1][-1] == ".":
            last = words[-1][:-1]
            if len(last) == 1 or last in ABBREVIATIONS:
                return _lex(text)
            words[-1:] = [last] if last else []
        return words if TWO_WORDS.keys().isdisjoint(words) else " ".join(TWO_WORDS.get(word, word) for word in words).split()
    return _lex(text)


def _lex(text: str) -> list[str]:
    """The same by the rules, for any text."""
    if "&" in text:
        for entity, character in ENTITIES.items():
            text = text.replace(entity, character)
    tokens = _TOKEN(text.replace("’", "'"))
    words = " ".join([TWO_WORDS.get(token, token) for token in map(str.lower, tokens)])
    return words.translate(NAMES).split()
