"""The reward of self-critical training (Rennie et al., CVPR 2017): CIDEr-D of sampled captions against their images' training captions.

Equal to `compress.metrics.CiderD` over the same references (see there for the metric), and built for a training loop: an index that
stays small for half a million references (of each only its tokens and norms are kept), and a few array operations per batch.

A candidate meets a reference as a table of equal tokens; an n-gram that both have is a run of n on one of its diagonals. Of a candidate's
position p with the n-gram g, let c be how often the candidate has g, r how often the reference has it, w its log N - log df. Summed over
distinct n-grams, CIDEr-D's clipped product is min(c, r) r w^2 and the squared norm is c^2 w^2; summed over positions, each n-gram is met c
times, so that they are min(c, r) r w^2 / c and c w^2, and no n-gram has to be told from another. Sums run in the order of positions:
a caption's reward has the same bits in every batch.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from compress.context import Progress
from compress.errors import DataError
from compress.ptb import ptb_tokenize
from students.lightcap.tokenizer import decode_caption, pieces_added

ORDERS = 4
SIGMA = 6.0
PART = 512  # references that are scored together
SCALE = 1000.0  # CIDEr-D is 10 times the mean cosine, and this project's scores are 100 times CIDEr-D
NEITHER = -1, -2  # fill candidates and references: equal to no token, nor to each other


@dataclass(frozen=True, eq=False)
class CiderReward:
    """References, indexed by `CiderReward.of`.

    tokenizer: decodes the sampled word pieces; `added`: what most of them add to a caption (`pieces_added`).
    numbers: {token of a reference: its number below V}.
    tokens (all tokens,) int32, `starts` (references + 1,): reference c is tokens[starts[c]:starts[c + 1]].
    first (images + 1,): image i's references are those from first[i] to first[i + 1].
    norms (references, 4): lengths of their TF-IDF vectors, per order.
    codes, for the orders 2, 3, 4: sorted, (place among the n-grams of one token less) * V + number of the last token, for each n-gram,
    and a last entry that no n-gram has.
    weights, for the orders 1 to 4: log(images) - log(images that hold the n-gram), in the order of `codes`; the last entry is log(images),
    for n-grams that no reference has.
    """

    tokenizer: Tokenizer
    added: dict[int, str]
    numbers: dict[str, int]
    tokens: np.ndarray
    starts: np.ndarray
    first: np.ndarray
    norms: np.ndarray
    codes: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]

    @staticmethod
    def of(references: Sequence[Sequence[str]], tokenizer: Tokenizer, progress: Progress | None = None) -> CiderReward:
        """`references[i]` are training image i's captions, raw texts; each image is one document. Raises DataError for fewer than two
        images, or an image without references."""
        if len(references) < 2:
            raise DataError(f"there are {len(references)} training images to reward captions by; CIDEr weighs words by how few of several "
                            "images have them")
        numbers: dict[str, int] = {}
        tokens, lengths = array("i"), array("i")
        with (progress or Progress(quiet=True)).task("references", len(references)) as task:
            for image, captions in enumerate(references):
                if isinstance(captions, str):
                    raise DataError(f"the references of training image {image} are one text, not a list of captions")
                if not len(captions):
                    raise DataError(f"training image {image} has no captions to reward captions by")
                for caption in captions:
                    words = ptb_tokenize(caption)
                    tokens.extend([numbers.setdefault(word, len(numbers)) for word in words])
                    lengths.append(len(words))
                task.advance()
        first = np.cumsum([0, *map(len, references)])
        flat, starts = np.array(tokens, np.int32), np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
        return CiderReward(tokenizer, pieces_added(tokenizer), numbers, flat, starts, first, *_index(flat, starts, first, len(numbers)))

    def __call__(self, images: Sequence[int] | np.ndarray, sampled: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """The rewards (images, k), float64, of k captions for each of `images` (numbers of training images); `sampled[b]` holds the k
        captions of `images[b]`, lists of word-piece ids.

        The reward is CIDEr-D times 100, as in `compress.metrics.Scores.per_image`: 0 to 1000, around 100 for good captions. Divide it by
        100 where a loss wants values near 1. A caption without tokens has 0. Raises ValueError for images that there are not, or
        unequal numbers of captions.
        """
        image = np.asarray(images, dtype=np.int64).reshape(-1)
        counts = {len(captions) for captions in sampled}
        if len(sampled) != len(image):
            raise ValueError(f"{len(image)} images cannot have the sampled captions of {len(sampled)}")
        if len(counts) > 1:
            raise ValueError(f"every image needs as many sampled captions as the others, not {sorted(counts)}")
        if image.size and not 0 <= image.min() <= image.max() < len(self.first) - 1:
            raise ValueError(f"the training images are 0 to {len(self.first) - 2}, not {image.min()} to {image.max()}")
        k = max(counts, default=0)
        words = [ptb_tokenize(self._text(ids)) for captions in sampled for ids in captions]
        return self._score(np.repeat(image, k), words).reshape(len(image), k)

    def _text(self, ids: Sequence[int]) -> str:
        """What `decode_caption` gives, sooner where each piece is known to add the same wherever it stands."""
        parts = [self.added.get(index) for index in ids]
        if not parts or None in parts or not parts[0].startswith(" "):  # a piece that continues nothing keeps its prefix
            return decode_caption(self.tokenizer, ids)
        return "".join(parts).strip()

    def agreement(self) -> np.ndarray:
        """(references,) float64, 1 on average: of each reference its reward against the others of its image. Of an only one, and where no
        two agree, 1."""
        image = np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))
        count, names = np.diff(self.first)[image], list(self.numbers)
        words = [[names[number] for number in self.tokens[start:stop]] for start, stop in itertools.pairwise(self.starts)]
        parts = (slice(start, start + PART) for start in range(0, len(words), PART))
        of_all = np.concatenate([self._score(image[part], words[part]) for part in parts])
        alike = SCALE * (self.norms > 0).mean(1)  # what each has of itself
        of_others = np.maximum(count * of_all - alike, 0.0) / np.maximum(count - 1, 1)
        several = count > 1
        mean = of_others[several].mean() if several.any() else 0.0
        return np.where(several, of_others / mean, 1.0) if mean > 0 else np.ones(len(image))

    def _score(self, image: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
        """The rewards (C,) of C tokenized captions, caption i for image[i]."""
        if not len(captions):
            return np.zeros(0)
        unknown: dict[str, int] = {}
        known, size = self.numbers, len(self.numbers)
        flat = list(map(known.get, itertools.chain.from_iterable(captions)))
        if None in flat:
            flat = [known[w] if w in known else unknown.setdefault(w, size + len(unknown)) for words in captions for w in words]
        length = np.array([len(words) for words in captions])
        ours = _table(np.array(flat, np.int32), length, NEITHER[0])

        # A pair is a candidate and one reference of its image.
        per_candidate = self.first[image + 1] - self.first[image]
        candidate = np.repeat(np.arange(len(captions)), per_candidate)
        reference = np.arange(len(candidate)) - np.repeat(np.cumsum(per_candidate) - per_candidate - self.first[image], per_candidate)
        rows, row = np.unique(reference, return_inverse=True)
        their_length = self.starts[rows + 1] - self.starts[rows]
        at = np.arange(their_length.sum()) + np.repeat(self.starts[rows] - np.cumsum(their_length) + their_length, their_length)
        theirs = _table(self.tokens[at], their_length, NEITHER[1])

        within = _common(ours, np.where(ours == NEITHER[0], NEITHER[1], ours))
        shared = _common(ours[candidate], theirs[row])
        height, cosine = ours.shape[1], np.zeros((len(candidate), ORDERS))
        for order, weight in enumerate(self._weights_at(ours)):
            own = np.bincount(within[order], minlength=ours.size)
            square = np.where(own > 0, weight.reshape(-1) ** 2, 0.0)
            share = square / np.maximum(own, 1)
            # cumsum and bincount add from left to right, however wide the tables are; sum does not promise an order.
            norm = np.sqrt(np.cumsum((own * square).reshape(ours.shape), axis=1)[:, -1])
            place, count = _counted(shared[order])
            pair, begins = np.divmod(place, height)
            begins += candidate[pair] * height
            product = np.minimum(own[begins], count) * count * share[begins]
            scale = norm[candidate] * self.norms[reference, order]
            np.divide(np.bincount(pair, product, minlength=len(candidate)), scale, out=cosine[:, order], where=scale > 0)
        # coco-caption's lengths are numbers of bigrams: the difference is the same, but where a caption has no tokens, and no cosine.
        delta = length[candidate] - their_length[row]
        similarity = cosine.mean(1) * np.exp(-(delta**2) / (2 * SIGMA**2))
        return np.bincount(candidate, similarity, minlength=len(captions)) / per_candidate * SCALE

    def _weights_at(self, table: np.ndarray) -> list[np.ndarray]:
        """Per order, the weight of the n-gram that begins at each place of `table` (C, H); anything where a caption has none there."""
        size = len(self.numbers)
        place = np.where((table >= 0) & (table < size), table, size)
        weights = [self.weights[0][place]]
        for order, (codes, values) in enumerate(zip(self.codes, self.weights[1:], strict=True), 1):
            last = np.full_like(table, NEITHER[0])
            last[:, :-order] = table[:, order:]
            lost = len(values) - 1
            spelled = (place < len(self.weights[order - 1]) - 1) & (last >= 0) & (last < size)  # others are not looked for
            code, back = np.unique(place[spelled] * np.int64(size) + last[spelled], return_inverse=True)  # in order, the search is faster
            found = np.searchsorted(codes, code)
            place = np.full(table.shape, lost)
            place[spelled] = np.where(codes[found] == code, found, lost)[back]
            weights.append(values[place])
        return weights


def _table(flat: np.ndarray, length: np.ndarray, fill: int) -> np.ndarray:
    """Captions as the rows of a table, with `fill` behind each, so that no n-gram crosses a row's end."""
    table = np.full((len(length), int(length.max(initial=0)) + 1), fill, dtype=np.int32)
    table[np.arange(table.shape[1]) < length[:, None]] = flat
    return table


def _common(ours: np.ndarray, theirs: np.ndarray) -> list[np.ndarray]:
    """Per order, the places of `ours` (rows, H), flat and ascending, where an n-gram begins that the same row of `theirs` (rows, W) has:
    each as often as it has it."""
    width = theirs.shape[1]
    equal = (ours[:, :, None] == theirs[:, None, :]).reshape(-1)
    run = np.flatnonzero(equal)
    places = [run // width]
    for order in range(1, ORDERS):
        run = run[equal[run + order * (width + 1)]]  # along the diagonal
        places.append(run // width)
    return places


def _counted(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of ascending `places`, and how often each is there."""
    first = np.flatnonzero(np.diff(places, prepend=-1))
    return places[first], np.diff(first, append=len(places))


def _index(
    tokens: np.ndarray, starts: np.ndarray, first: np.ndarray, size: int
) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(norms, codes, weights) as `CiderReward` has them; `size` is the number of distinct tokens."""
    lengths, images = np.diff(starts), len(first) - 1
    caption = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    image = np.repeat(np.arange(images, dtype=np.int32), np.diff(first))
    left = np.repeat(starts[1:], lengths) - np.arange(len(tokens))  # tokens from here to the caption's end
    place = np.zeros(len(tokens), dtype=np.int64)
    norms, codes, weights = np.zeros((len(lengths), ORDERS)), [], []
    for order in range(ORDERS):
        at = np.flatnonzero(left > order)
        code = place[at] * size + tokens[at + order]
        by_code = np.argsort(code, kind="stable")  # within an n-gram by image, and within an image by caption
        code, at = code[by_code], at[by_code]
        owner = caption[at]
        fresh = np.diff(code, prepend=-1) != 0
        number = np.cumsum(fresh) - 1
        place[at] = number
        in_image = fresh | (np.diff(image[owner], prepend=-1) != 0)
        in_caption = np.flatnonzero(fresh | (np.diff(owner, prepend=-1) != 0))
        weight = np.log(float(images)) - np.log(np.bincount(number[in_image]))
        count = np.diff(in_caption, append=len(code))
        norms[:, order] = np.bincount(owner[in_caption], (count * weight[number[in_caption]]) ** 2, minlength=len(lengths))
        codes.append(np.append(code[fresh], np.iinfo(np.int64).max))
        weights.append(np.append(weight, np.log(float(images))))
    return np.sqrt(norms), tuple(codes[1:]), tuple(weights)
