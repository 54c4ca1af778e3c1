"""Word pieces in BERT's layout, as a `tokenizers.Tokenizer` that is written to tokenizer.json."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import string
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ENGLISH_WORDS = 8000


def word_pieces(pieces: Sequence[str]) -> Tokenizer:
    """A WordPiece tokenizer over `pieces`, whose position is their id. Capitals are made small, and accents taken off, where no piece has
    any. ValueError for a piece that stands there twice."""
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        twice = next(piece for index, piece in enumerate(pieces) if vocabulary[piece] != index)
        raise ValueError(f"the word piece '{twice}' stands in the vocabulary more than once")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    words = [piece for piece in pieces if piece.removeprefix("##").isalpha()]
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=all(word == word.lower() for word in words), strip_accents=not any(map(accented, words))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = joining("##")
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return tokenizer


def joining(prefix: str) -> decoders.Decoder:
    """Joins what BERT splits: pieces that begin with `prefix`, and "t-shirt" and "dog's", which references have whole."""
    words = [decoders.Replace(Regex(r"(?<=\w) - (?=\w)"), "-"), decoders.Replace(Regex(r" ' (?=(?:s|t|re|ve|ll|d|m)\b)"), "'")]
    return decoders.Sequence([decoders.WordPiece(prefix=prefix, cleanup=True), decoders.Fuse(), *words])


def accented(text: str) -> bool:
    """Whether BERT would take accents off: marks of Unicode's decomposition."""
    return any(unicodedata.category(letter) == "Mn" for letter in unicodedata.normalize("NFD", text))


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    return [piece for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def load_tokenizer(source: str) -> Tokenizer:
    """`english` (the frequent whole words of CLIP's vocabulary, which open_clip carries, and every printable character), `minilm`
    (BERT's 30,522 pieces, from the extra `photos`), a tokenizer.json or vocab.txt or a folder with one, or a hub name."""
    if source == "english":
        return word_pieces(english())
    if source == "minilm":
        from students.lightcap.bert import minilm_folder

        return from_vocabulary(minilm_folder() / "vocab.txt")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        path = next((path / name for name in ("vocab.txt", "tokenizer.json") if (path / name).is_file()), path / "vocab.txt")
    if path.is_file():
        return from_vocabulary(path) if path.suffix == ".txt" else read_tokenizer(path)
    from huggingface_hub import hf_hub_download

    try:
        return from_vocabulary(Path(hf_hub_download(source, "vocab.txt")))
    except Exception:
        raise FileNotFoundError(
            f"no tokenizer at '{source}': give a folder with vocab.txt or tokenizer.json, a hub name, 'english' or 'minilm' "
            "in student.tokenizer"
        ) from None


def read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json, checked for BERT's special tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
    check_special(tokenizer, path)
    if isinstance(tokenizer.model, models.WordPiece):
        tokenizer.decoder = joining(tokenizer.model.continuing_subword_prefix)  # the file's own leaves "dog ' s" and "t - shirt"
    tokenizer.no_padding()  # a file may ask for both, and captions would be trained on with [PAD] in them
    tokenizer.no_truncation()
    return tokenizer


def from_vocabulary(path: Path) -> Tokenizer:
    """vocab.txt, a piece a line. (str.splitlines would cut at U+2028, too, which is a piece of Chinese BERT's.)"""
    try:
        tokenizer = word_pieces(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_special(tokenizer, path)
    return tokenizer


def check_special(tokenizer: Tokenizer, path: Path) -> None:
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(f"{path}: BERT's special tokens are missing: {', '.join(missing)}")


def characters() -> list[str]:
    """Every printable ASCII character, lower-case, alone and as a continuation: with them any such word can be spelled."""
    alone = [c for c in string.printable.strip() if not c.isupper()]
    return alone + [f"##{c}" for c in alone if c.isalnum()]


def english() -> list[str]:
    """Special tokens, characters, and the whole words that CLIP's byte-pair merges reach first: the most frequent English ones."""
    spec = importlib.util.find_spec("open_clip")
    table = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    words: dict[str, None] = {}
    with gzip.open(table, "rt", encoding="utf-8") as file:
        for merge in itertools.islice(file, 1, None):
            word = "".join(merge.split())
            if word.endswith("</w>") and len(word := word.removesuffix("</w>")) > 1 and word.isascii() and word.isalpha():
                words[word] = None
                if len(words) == ENGLISH_WORDS:
                    break
    return [*SPECIAL, *characters(), *words]


def encode_captions(tokenizer: Tokenizer, captions: Iterable[str], max_tokens: int) -> list[list[int]]:
    """[CLS] pieces [SEP] for each caption; a final full stop is not learned. Of a caption longer than `max_tokens` pieces the first ones
    are kept, without [SEP]: it must not be learned that captions end there."""
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    cleaned = [caption.strip().rstrip(".").strip() for caption in captions]
    encoded = (item.ids for item in tokenizer.encode_batch(cleaned, add_special_tokens=False))
    return [[start, *ids, end] if len(ids) <= max_tokens else [start, *ids[:max_tokens]] for ids in encoded]


def decode_caption(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()


def pieces_added(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> what the piece adds behind others to what `decode_caption` gives: " dog", "ing", ",". Of ASCII pieces without spaces, but for
    added tokens and those with ' or -, which may join their neighbours; of a tokenizer that joins pieces in another way, of none."""
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    joined = [] if prefix is None else [joining(prefix), decoders.WordPiece(prefix=prefix, cleanup=True)]
    if tokenizer.decoder is None or all(tokenizer.decoder.__getstate__() != decoder.__getstate__() for decoder in joined):
        return {}
    special, added = tokenizer.get_added_tokens_decoder(), {}
    pieces = {piece: index for piece, index in tokenizer.get_vocab().items() if index not in special and piece.isascii()
              and piece not in ("", prefix) and not any(map(str.isspace, piece))}
    before = next((index for piece, index in pieces.items() if piece.isalpha()), None)
    known = 0 if before is None else len(tokenizer.decode([before]))
    for piece, index in pieces.items():
        text = piece[len(prefix) :] if piece.startswith(prefix) else f" {piece}"
        if text.lstrip().isalpha():
            added[index] = text
        elif before is not None and not {"'", "-"} & {*piece}:  # the decoder takes the space before some marks
            added[index] = tokenizer.decode([before, index])[known:]
    return added


def keep_pieces(tokenizer: Tokenizer, seen: Iterable[int]) -> list[int]:
    """The ids that a smaller vocabulary keeps, ascending: special tokens, single characters (alone and continued), and `seen`."""
    pieces = pieces_of(tokenizer)
    single = [i for i, piece in enumerate(pieces) if piece in SPECIAL or len(piece.removeprefix("##")) == 1]
    return sorted({*single, *(int(i) for i in seen)})


def check_narrows(tokenizer: Tokenizer) -> None:
    """ValueError for a tokenizer that `narrowed` has none of."""
    if not isinstance(tokenizer.model, models.WordPiece):
        raise ValueError(f"only WordPiece vocabularies can be narrowed, this one is {type(tokenizer.model).__name__}")


def narrowed(tokenizer: Tokenizer, keep: Sequence[int]) -> Tokenizer:
    """The tokenizer over the pieces `keep`, which splits and joins words as before. Words whose pieces are gone are spelled in smaller
    ones."""
    check_narrows(tokenizer)
    pieces = pieces_of(tokenizer)
    settings = json.loads(tokenizer.to_str())
    settings["model"]["vocab"] = place = {pieces[i]: new for new, i in enumerate(keep)}
    added = (token for token in settings["added_tokens"] if token["content"] in place)
    settings["added_tokens"] = sorted(({**token, "id": place[token["content"]]} for token in added), key=lambda token: token["id"])
    settings["post_processor"] = None  # it holds ids, of tokens that captions are given without it
    return Tokenizer.from_str(json.dumps(settings))
