"""CIDEr-D (Vedantam, Zitnick, Parikh: CIDEr, CVPR 2015, section 6) as coco-caption computes it.

The n-grams of a candidate and of each reference are vectors of tf * (log N - log df). A pair's similarity is, per order n, the
clipped cosine `sum(min(c, r) * r) / (|c| |r|)` times `exp(-(len c - len r)^2 / (2 sigma^2))`; a candidate's score is the mean over
the orders and its image's references, times 10. As in coco-caption a caption's "length" is its number of bigrams, so captions of
one word and of none count as equally long, and an n-gram that no document holds has df 1.

References are indexed once: n-grams become integers and all vectors lie in one sorted array, so that scoring is a few array
operations, and the sampled captions of a training step are scored in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from compress.ptb import ptb_tokenize

Caption = str | Sequence[str]  # a text, or its tokens


def tokens(caption: Caption) -> Sequence[str]:
    """The tokens of a text; a list of tokens is returned as it is."""
    return ptb_tokenize(caption) if isinstance(caption, str) else caption


class CiderD:
    """CIDEr-D against fixed references.

    `references[i]` are the captions of image i: texts, or lists of tokens that are taken as they are. Document frequencies are
    counted over these images, or given as `document_frequencies` {n-gram as a tuple of tokens: number of images} over
    `num_documents` images; another `CiderD` has them under the same names.

    Raises ValueError for no images, an image without references, or frequencies that do not fit their number of documents.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Caption]],
        n: int = 4,
        sigma: float = 6.0,
        document_frequencies: Mapping[tuple[str, ...], float] | None = None,
        num_documents: int | None = None,
    ) -> None:
        per_image = np.array([len(captions) for captions in references], dtype=np.int64)
        if not len(per_image):
            raise ValueError("CIDEr-D needs the references of at least one image")
        if not per_image.all():
            raise ValueError(f"image {int(np.argmin(per_image))} has no reference captions")
        if (document_frequencies is None) != (num_documents is None):
            raise ValueError("document_frequencies and num_documents go together")
        self.n, self.sigma = n, sigma
        self.num_documents = len(per_image) if num_documents is None else num_documents
        self._first = np.concatenate([[0], np.cumsum(per_image)])  # image i's captions are rows first[i] to first[i + 1]

        captions = [tokens(caption) for image in references for caption in image]
        rows = len(captions)
        given = [gram for gram in document_frequencies or () if 1 <= len(gram) <= n]  # indexed as if they were captions
        flat, lengths = self._number_words(captions + given)
        orders = list(_ngrams(flat, lengths, n, self._number_ngrams))
        self._offsets = np.cumsum([0, *map(len, self._codes)])
        self._size = int(self._offsets[-1])
        ends = [np.searchsorted(owner, rows) for owner, _ in orders]  # the n-grams of the references come first
        row = np.concatenate([owner[:end] for (owner, _), end in zip(orders, ends, strict=True)])
        gram = np.concatenate([number[:end] + base for (_, number), end, base in zip(orders, ends, self._offsets[:-1], strict=True)])
        self._key, count = np.unique(row * self._size + gram, return_counts=True)  # caption row * size + n-gram, sorted
        row, gram = np.divmod(self._key, max(1, self._size))

        if document_frequencies is None:
            image_of = np.repeat(np.arange(len(per_image)), per_image)
            seen = np.sort(image_of[row] * self._size + gram)  # numpy's unique without counts hashes, which is far slower here
            once = seen[np.diff(seen, prepend=-1) > 0] % max(1, self._size)
            self._frequencies = np.bincount(once, minlength=self._size).astype(np.float64)
        else:
            self._frequencies = np.zeros(self._size)
            values = np.array([document_frequencies[gram_] for gram_ in given], dtype=np.float64)
            for order, (owner, number) in enumerate(orders):
                whole = np.flatnonzero(lengths[rows:] == order + 1)  # of these "captions" the only n-gram of this order is themselves
                self._frequencies[number[np.searchsorted(owner, whole + rows)] + self._offsets[order]] = values[whole]
        if self._frequencies.max(initial=0) > self.num_documents:
            raise ValueError(f"an n-gram occurs in {self._frequencies.max():g} documents of {self.num_documents}")
        self._log_documents = float(np.log(float(self.num_documents)))
        self._idf = self._log_documents - np.log(np.maximum(1.0, self._frequencies))
        self._weight = count * self._idf[gram]
        order_of = np.searchsorted(self._offsets, gram, side="right") - 1
        self._norm = self._norms(row, order_of, self._weight, rows)
        self._length = self._bigrams(lengths[:rows])

    @property
    def document_frequencies(self) -> dict[tuple[str, ...], int]:
        """{n-gram: number of images whose references hold it}, for a `CiderD` over other references."""
        words = list(self._words)
        grams: list[tuple[str, ...]] = [()]
        found: dict[tuple[str, ...], int] = {}
        for order, codes in enumerate(self._codes):
            prefix, last = np.divmod(codes, self._stride)
            grams = [grams[p] + (words[w],) for p, w in zip(prefix.tolist(), last.tolist(), strict=True)]
            counts = self._frequencies[self._offsets[order] : self._offsets[order + 1]].astype(int).tolist()
            found.update((gram, count) for gram, count in zip(grams, counts, strict=True) if count)
        return found

    def score(self, candidates: Sequence[Caption], indexes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """CIDEr-D of each candidate on coco-caption's scale (0 to 10; published numbers are 100 times the mean), float64 (candidates,).

        Candidate i belongs to image `indexes[i]`, or to image i where there are no indexes. Raises ValueError where they do not fit the
        images.
        """
        images = len(self._first) - 1
        image = np.arange(images) if indexes is None else np.asarray(indexes, dtype=np.int64)
        if image.shape != (len(candidates),):
            raise ValueError(f"{len(candidates)} candidates for {image.size} images")
        if not len(candidates):
            return np.zeros(0)
        if image.min() < 0 or image.max() >= images:
            raise ValueError(f"an index is outside the {images} images")
        row, gram, order, weight, norm, length = self._vectors([tokens(caption) for caption in candidates])

        # Pairs are candidates with each reference of their image; each known n-gram of a candidate is looked up in all its pairs.
        references = self._first[image + 1] - self._first[image]
        first_pair = np.cumsum(references) - references
        pairs = int(references.sum())
        candidate = np.repeat(np.arange(len(candidates)), references)
        reference = np.arange(pairs) - np.repeat(first_pair - self._first[image], references)
        repeats = references[row]
        entry = np.repeat(np.arange(len(row)), repeats)
        pair = np.arange(len(entry)) + np.repeat(first_pair[row] - (np.cumsum(repeats) - repeats), repeats)
        wanted = reference[pair] * self._size + gram[entry]
        at = np.minimum(np.searchsorted(self._key, wanted), max(0, len(self._key) - 1))
        hit = np.flatnonzero(self._key[at] == wanted) if len(self._key) else at[:0]
        ours, theirs = weight[entry[hit]], self._weight[at[hit]]
        dot = np.bincount(pair[hit] * self.n + order[entry[hit]], np.minimum(ours, theirs) * theirs, minlength=pairs * self.n)
        dot = dot.reshape(pairs, self.n).astype(np.float64)

        scale = norm[candidate] * self._norm[reference]
        delta = (length[candidate] - self._length[reference]).astype(np.float64)
        similarity = np.divide(dot, scale, out=dot, where=scale > 0).mean(1) * np.exp(-(delta**2) / (2 * self.sigma**2))
        return np.bincount(candidate, similarity, minlength=len(candidates)) / references * 10.0

    def _number_words(self, captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """All words of the captions as numbers, and the captions' lengths; fills the vocabulary."""
        words = list(chain.from_iterable(captions))
        self._words = {word: number for number, word in enumerate(dict.fromkeys(words))}
        self._stride = max(1, len(self._words))
        self._codes: list[np.ndarray] = []  # per order, sorted: prefix's number * stride + last word's number
        flat = np.fromiter(map(self._words.__getitem__, words), np.int64, len(words))
        return flat, np.fromiter(map(len, captions), np.int64, len(captions))

    def _number_ngrams(self, order: int, prefix: np.ndarray, last: np.ndarray) -> np.ndarray:
        codes, number = np.unique(prefix * self._stride + last, return_inverse=True)
        self._codes.append(codes)
        return number

    def _vectors(self, captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, ...]:
        """Caption, n-gram, order and weight of every distinct known n-gram, sorted; norms (captions, n); lengths (captions,)."""
        known, fresh = self._words, {}
        words = list(chain.from_iterable(captions))
        flat = np.array([known[w] if w in known else fresh.setdefault(w, self._stride + len(fresh)) for w in words], dtype=np.int64)
        lengths = np.fromiter(map(len, captions), np.int64, len(captions))
        wide = self._stride + len(fresh)

        def number(order: int, prefix: np.ndarray, last: np.ndarray) -> np.ndarray:
            # N-grams that no reference has are told apart by negative numbers: they match nothing, but count in the norm.
            codes = self._codes[order]
            code = np.where((prefix >= 0) & (last < self._stride), prefix * self._stride + last, -1)
            numbers = np.searchsorted(codes, code)
            lost = np.append(codes, -2)[numbers] != code
            numbers[lost] = -1 - np.unique(prefix[lost] * wide + last[lost], return_inverse=True)[1]
            return numbers

        rows, grams, orders, weights = [], [], [], []
        for order, (owner, numbers) in enumerate(_ngrams(flat, lengths, self.n, number)):
            span, lowest = len(self._codes[order]) + len(words) + 1, numbers.min(initial=0)
            key, count = np.unique(owner * span + (numbers - lowest), return_counts=True)
            owner, numbers = np.divmod(key, span)
            numbers += lowest
            idf = self._idf[self._offsets[order] : self._offsets[order + 1]]
            rows.append(owner)
            grams.append(np.where(numbers >= 0, numbers + self._offsets[order], -1))
            orders.append(np.full(len(owner), order))
            weights.append(count * np.where(numbers >= 0, np.append(idf, 0.0)[np.maximum(numbers, -1)], self._log_documents))
        row, gram, order, weight = map(np.concatenate, (rows, grams, orders, weights))
        norm = self._norms(row, order, weight, len(captions))
        match = np.flatnonzero(gram >= 0)
        match = match[np.argsort(row[match], kind="stable")]  # neighbours in the lookup are neighbours in memory
        return row[match], gram[match], order[match], weight[match], norm, self._bigrams(lengths)

    def _norms(self, row: np.ndarray, order: np.ndarray, weight: np.ndarray, rows: int) -> np.ndarray:
        return np.sqrt(np.bincount(row * self.n + order, weight**2, minlength=rows * self.n)).reshape(rows, self.n)

    def _bigrams(self, lengths: np.ndarray) -> np.ndarray:
        return np.maximum(lengths - 1, 0) if self.n > 1 else np.zeros_like(lengths)


def _ngrams(
    flat: np.ndarray, lengths: np.ndarray, n: int, number: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For the orders 1 to n: the captions (sorted) and the numbers of all n-grams.

    `number(order - 1, prefixes, last words)` numbers the n-grams of an order, given the numbers of their prefixes of one word less.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # words from here to the caption's end
    at, prefix = np.arange(len(flat)), np.zeros(len(flat), dtype=np.int64)
    for order in range(n):
        if order:
            longer = left > order
            owner, left, at, prefix = owner[longer], left[longer], at[longer], prefix[longer]
        prefix = number(order, prefix, flat[at + order])
        yield owner, prefix
