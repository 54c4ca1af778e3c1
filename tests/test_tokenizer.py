"""Captions become word pieces, and word pieces captions."""

import random

import pytest
from tokenizers import decoders

from students.lightcap.tokenizer import SPECIAL, decode_caption, encode_captions, load_tokenizer, pieces_added, pieces_of, word_pieces


@pytest.mark.parametrize("text", ["a man's t-shirt", "a black-and-white dog isn't here", "the boy , who 's six , jumps ."])
def test_words_that_bert_splits_are_joined_again(text):
    tokenizer = load_tokenizer("minilm")
    ids = encode_captions(tokenizer, [text], 20)[0]
    assert decode_caption(tokenizer, ids) == text.replace(" ,", ",").replace(" 's", "'s").replace(" .", "")


def test_a_caption_that_was_cut_does_not_end():
    tokenizer = load_tokenizer("english")
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    fits, cut = encode_captions(tokenizer, ["a red dog .", "a red dog and a cat"], 3)
    assert [len(fits), len(cut)] == [5, 4]
    assert fits[:4] == cut and fits[0] == start and fits[-1] == end and end not in cut


def test_a_tokenizer_that_pads_and_cuts_does_neither_here(tmp_path):
    tokenizer = load_tokenizer("english")
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(str(tmp_path / "tokenizer.json"))
    captions = ["a dog runs over the green grass", "a dog"]
    said = [[pieces_of(read)[piece] for piece in ids] for ids in encode_captions(read, captions, 30)]
    assert said == [["[CLS]", *caption.split(), "[SEP]"] for caption in captions]


def test_vocabularies_of_other_languages(tmp_path):
    """A line separator is a piece of Chinese BERT's; capitals and accents stay where pieces have them, and are taken off where none has."""

    def said(name: str, pieces: list[str], text: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]) + "\n", encoding="utf-8")
        tokenizer = load_tokenizer(str(tmp_path / name))
        assert pieces_of(tokenizer)[5:] == pieces
        return decode_caption(tokenizer, encode_captions(tokenizer, [text], 20)[0])

    assert said("chinese", ["\u2028", "\u72d7", "\u8dd1"], "\u72d7\u8dd1") == "\u72d7 \u8dd1"
    assert said("cased", ["Ein", "M\u00e4dchen", "ein"], "Ein M\u00e4dchen") == "Ein M\u00e4dchen"
    assert said("small", ["ein", "m\u00e4dchen"], "Ein M\u00e4dchen") == "ein m\u00e4dchen"
    assert said("plain", ["ein", "madchen"], "Ein M\u00e4dchen") == "ein madchen"
    with pytest.raises(ValueError, match="twice/vocab.txt: the word piece 'a' stands in the vocabulary more than once"):
        said("twice", ["a", "b", "a"], "a")


@pytest.mark.parametrize("special", [(), ("<S>", "<T>", "\u1112", "\u1161")])
def test_an_uncased_vocabulary_takes_capitals_and_accents_off(special):
    """Also beside the jamo that BERT's own holds, which stand beside each other and would make one syllable, and Chinese BERT's <S>."""
    tokenizer = word_pieces([*SPECIAL, *special, "cafe", "##s"])
    assert tokenizer.encode("CAF\u00c9s", add_special_tokens=False).tokens == ["cafe", "##s"]


def test_a_tokenizer_json_joins_words_as_references_have_them(tmp_path):
    whole = load_tokenizer("english")
    text = "a dog's t-shirt, torn"
    whole.decoder = decoders.WordPiece()
    assert decode_caption(whole, encode_captions(whole, [text], 20)[0]) != text
    whole.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert decode_caption(read, encode_captions(read, [text], 20)[0]) == text


ODD = [*SPECIAL, "##", "do not", "## cat", "x .", " b", "A", "7", "##7", ",", "(", "##.", "####", "n't", "don", "not", "\t", "t", "##ing",
       ""]


@pytest.mark.parametrize("source", ["english", "minilm", "odd"])
def test_a_piece_adds_to_a_caption_what_the_decoder_makes_of_it(source):
    tokenizer, draw = word_pieces(ODD) if source == "odd" else load_tokenizer(source), random.Random(3)
    added = pieces_added(tokenizer)
    first = [index for index, text in added.items() if text[0] == " "]
    assert {added[tokenizer.token_to_id(mark)] for mark in ",(7"} == {",", " (", " 7"}
    assert 0.3 < len(added) / tokenizer.get_vocab_size() < 1 and not added.keys() & {tokenizer.token_to_id(name) for name in SPECIAL}
    for _ in range(300):
        ids = [draw.choice(first), *draw.choices(list(added), k=draw.randint(0, 20))]
        assert decode_caption(tokenizer, ids) == "".join(map(added.get, ids)).strip()
    tokenizer.decoder = decoders.ByteLevel()
    assert pieces_added(tokenizer) == {}
