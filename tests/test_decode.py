"""Beam search against brute force, sampling against its probabilities, and PyTorch's search against the device's."""

import itertools
import types

import numpy as np
import pytest
import torch

from compress import runtime
from compress.decode import Hypothesis, Special, beam_search, sample
from students.lightcap.fusion import Seen

PAD, START, END, MASK = 0, 1, 2, 3
SPECIAL = Special(START, END, (PAD, START, MASK))
WORDS = (4, 5, 6)
VOCABULARY = 7


class Tables:
    """A captioner whose logits are a random function of the image and of every piece so far.

    `past` carries the image's number and the pieces as keys, of shape (B, 1, 1, 1) and (N, 1, length, 1), so a wrong reordering shows.
    """

    def __init__(self, seed: int, scale: float = 2.0) -> None:
        self.seed, self.scale = seed, scale
        self.steps = 0
        self.known: dict[tuple, np.ndarray] = {}

    def logits(self, history: tuple[float, ...]) -> np.ndarray:
        if history not in self.known:
            source = np.random.default_rng([self.seed, *(int(item) for item in history)])
            self.known[history] = (self.scale * source.standard_normal(VOCABULARY)).astype(np.float32)
        return self.known[history].copy()

    def prefill(self, grid):
        return [Seen(grid[:, None].clone(), grid[:, None].clone())]

    def step(self, tokens, position, past):
        [seen], pieces = past, tokens[:, None, :, None].float()
        own = pieces if seen.own_keys is None else torch.cat([seen.own_keys, pieces], 2)
        self.steps += 1
        assert own.shape[2] == position + 1 and seen.own_length == position
        whole = torch.cat([seen.keys.repeat_interleave(len(own) // len(seen.keys), 0), own], 2)
        logits = np.stack([self.logits(tuple(row[0, :, 0].tolist())) for row in whole])
        return torch.from_numpy(logits), [Seen(seen.keys, seen.values, own, own)]


def grid(images: int) -> torch.Tensor:
    return torch.arange(10.0, 10.0 + images).view(images, 1, 1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def logprob(model: Tables, image: int, pieces: tuple[int, ...]) -> float:
    """The log-probability of producing `pieces` after [CLS]."""
    history, total = [10 + image, START], 0.0
    for piece in pieces:
        total += log_softmax(model.logits(tuple(history)))[piece]
        history.append(piece)
    return total


def everything(model: Tables, image: int, most: int) -> dict[tuple[int, ...], tuple[float, float]]:
    """Every caption there is: (score, log-probability), finished by [SEP] or cut at `most` pieces."""
    found = {}
    for length in range(most + 1):
        for words in itertools.product(WORDS, repeat=length):
            pieces = words if length == most else (*words, END)
            total = logprob(model, image, pieces)
            found[words] = (total / len(pieces), total)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_finds_the_best_of_all(seed):
    model = Tables(seed)
    found = beam_search(model, grid(3), SPECIAL, beam=200, max_tokens=4)
    for image, hypothesis in enumerate(found):
        captions = everything(model, image, 4)
        best = max(captions, key=lambda words: captions[words][0])
        assert hypothesis.tokens == best
        assert (hypothesis.score, hypothesis.logprob) == pytest.approx(captions[best], abs=1e-4)


def test_the_search_prefers_the_better_mean_not_the_larger_sum():
    """[SEP] at once has the larger sum; three sure pieces have the better mean."""

    class Fixed(Tables):
        def logits(self, history):
            probabilities = np.full(VOCABULARY, 1e-6)
            if len(history) == 2:
                probabilities[END], probabilities[4] = 0.6, 0.4
            else:
                probabilities[4 if len(history) < 4 else END] = 1.0
            return np.log(probabilities).astype(np.float32)

    found = beam_search(Fixed(0), grid(1), SPECIAL, beam=2, max_tokens=5)[0]
    assert found.tokens == (4, 4) and found.score == pytest.approx(np.log(0.4) / 3, abs=1e-3)
    assert beam_search(Fixed(0), grid(1), SPECIAL, beam=1, max_tokens=5)[0].tokens == ()


@pytest.mark.parametrize("seed", range(5))
def test_beam_1_is_greedy(seed):
    model = Tables(seed)
    for image, hypothesis in enumerate(beam_search(model, grid(4), SPECIAL, beam=1, max_tokens=6)):
        history = [10 + image, START]
        while len(history) < 8:
            scores = log_softmax(model.logits(tuple(history)))
            scores[list(SPECIAL.never)] = -np.inf
            history.append(int(scores.argmax()))
            if history[-1] == END:
                break
        pieces = tuple(history[2:])
        assert hypothesis.tokens == tuple(piece for piece in pieces if piece != END)
        assert hypothesis.logprob == pytest.approx(logprob(model, image, pieces), abs=1e-4)


@pytest.mark.parametrize("beam", [2, 3, 5])
def test_scores_are_what_they_say_and_images_do_not_mix(beam):
    greedy, better = 0.0, 0
    for seed in range(20):
        model = Tables(seed, scale=1.0)
        together = beam_search(model, grid(3), SPECIAL, beam=beam, max_tokens=5)
        for image, hypothesis in enumerate(together):
            pieces = hypothesis.tokens if len(hypothesis.tokens) == 5 else (*hypothesis.tokens, END)
            assert set(hypothesis.tokens) <= set(WORDS)
            assert hypothesis.logprob == pytest.approx(logprob(model, image, pieces), abs=1e-4)
            assert hypothesis.score == pytest.approx(hypothesis.logprob / len(pieces))
            alone = beam_search(model, grid(3)[image : image + 1], SPECIAL, beam=beam, max_tokens=5)[0]
            assert alone == hypothesis and alone.tokens == hypothesis.tokens
        first = beam_search(model, grid(3), SPECIAL, beam=1, max_tokens=5)
        for a, b in zip(together, first, strict=True):
            greedy += a.score - b.score
            better += a.score > b.score + 1e-6
    assert greedy > 0 and better > 10  # a beam finds better captions, over all


def test_a_beam_of_the_whole_tree_is_never_worse_than_greedy():
    for seed in range(20):
        model = Tables(seed)
        for wide, greedy in zip(*(beam_search(model, grid(2), SPECIAL, beam=b, max_tokens=3) for b in (60, 1)), strict=True):
            assert wide.score >= greedy.score - 1e-6


def test_it_stops_when_every_image_is_done():
    class Short(Tables):
        def logits(self, history):
            out = super().logits(history)
            out[END] += 20 if len(history) > 3 else -20
            return out

    model = Short(0)
    beam_search(model, grid(2), SPECIAL, beam=2, max_tokens=30)
    assert model.steps <= 4


def test_special_pieces_are_never_produced():
    class Tempting(Tables):
        def logits(self, history):
            out = super().logits(history)
            out[list(SPECIAL.never)] += 30
            return out

    model = Tempting(0)
    for beam in (1, 3):
        for hypothesis in beam_search(model, grid(3), SPECIAL, beam=beam, max_tokens=6):
            assert set(hypothesis.tokens) <= set(WORDS)
    for drawn in sample(model, grid(2), SPECIAL, 50, max_tokens=6):
        assert all(set(hypothesis.tokens) <= set(WORDS) for hypothesis in drawn)


def test_special_of_a_tokenizer():
    from students.lightcap.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("english")
    special = Special.of(tokenizer)
    assert (special.start, special.end) == (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    assert set(special.never) == {tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[MASK]")}


# ---- sampling


def test_sampling_follows_the_probabilities():
    model, count = Tables(3, scale=1.0), 6000
    for image, drawn in enumerate(sample(model, grid(2), SPECIAL, count, max_tokens=2, seed=1)):
        assert len(drawn) == count
        expected: dict[tuple[int, ...], float] = {}
        for words in [(), *((a,) for a in WORDS), *itertools.product(WORDS, repeat=2)]:
            pieces = words if len(words) == 2 else (*words, END)
            history, total = [10 + image, START], 1.0
            for piece in pieces:  # over the pieces that may be produced
                share = np.exp(log_softmax(model.logits(tuple(history))))
                total *= share[piece] / share[[END, *WORDS]].sum()
                history.append(piece)
            expected[words] = total
        assert sum(expected.values()) == pytest.approx(1.0)
        for words, probability in expected.items():
            share = sum(hypothesis.tokens == words for hypothesis in drawn) / count
            assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / count) ** 0.5 + 1e-3)
        for hypothesis in drawn[:20]:
            assert hypothesis.logprob == pytest.approx(np.log(expected[hypothesis.tokens]), abs=1e-4)
            assert hypothesis.score == pytest.approx(hypothesis.logprob / min(2, len(hypothesis.tokens) + 1), abs=1e-4)


def test_sampling_is_reproducible():
    first, again, other = (sample(Tables(1), grid(2), SPECIAL, 20, max_tokens=5, seed=seed) for seed in (4, 4, 5))
    tokens = [[[h.tokens for h in drawn] for drawn in run] for run in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert tokens[0][0] != tokens[0][1]


# ---- the device's search


def device_search(model: Tables, images: int, beam: int, most: int) -> list[tuple[list[int], float]]:
    """`compress.runtime`'s search over the same logits."""
    captioner = types.SimpleNamespace(start=START, end=END, never=list(SPECIAL.never))

    def prefill(grid):
        number = model.prefill(torch.from_numpy(grid))[0].keys.numpy()
        return runtime.Past([number], [number[:, :, :0]])

    def step(tokens, position, past):
        number, own = torch.from_numpy(past.prefix[0]), torch.from_numpy(past.own[0])
        seen = Seen(number, number, own, own) if own.shape[2] else Seen(number, number)
        logits, [present] = model.step(torch.tensor(tokens)[:, None], position, [seen])
        return logits.numpy(), runtime.Past(past.prefix, [present.own_keys.numpy()])

    captioner.prefill = prefill

    captioner.step = step
    return runtime.Captioner.search(captioner, grid(images).numpy(), beam, most)


@pytest.mark.parametrize("beam", [1, 2, 3, 5, 8])
def test_the_device_searches_the_same_way(beam):
    lengths = set()
    for seed in range(12):
        model = Tables(seed, scale=1.5)
        here = beam_search(model, grid(4), SPECIAL, beam=beam, max_tokens=5)
        there = device_search(model, 4, beam, 5)
        for mine, (pieces, total) in zip(here, there, strict=True):
            assert mine.tokens == tuple(pieces)
            assert mine.logprob == pytest.approx(total, abs=1e-4)
            lengths.add(len(pieces))
    assert {0, 5} <= lengths or beam > 3 and 5 in lengths  # both ends were reached: [SEP], and the most pieces


def test_hypotheses_are_ordered_by_score_alone():
    assert max([Hypothesis(-1.0, -3.0, (4, 5)), Hypothesis(-0.5, -5.0, (6,))]).tokens == (6,)
