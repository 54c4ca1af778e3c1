"""The reward of self-critical training against pycocoevalcap's CIDEr-D with the document frequencies of the training references."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

from compress import metrics
from compress.data.scenes import compose
from compress.data.wording import describe
from compress.errors import DataError
from compress.ptb import ptb_tokenize
from compress.training.reward import CiderReward
from students.lightcap.tokenizer import decode_caption, load_tokenizer

DATA = Path(os.environ.get("LIGHTCAP_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
WRITTEN = [
    ["A dog's ball (red) lies on the grass.", "The dog can't reach its ball, it's gone."],
    ["Two men, one hat and a well-known t-shirt."],
    ["The the the cat sat on the mat on the mat.", "Cat.", "!", ""],  # repeats, one word, and no word
    ["A man waits at 5 p.m. in the U.S. The flag is red.", "Three dogs run", "dogs run", "a man & a woman cannot swim"],
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("english")


@pytest.fixture(scope="module")
def references():
    """Raw training captions: generated scenes, with written ones, of different numbers, between them."""
    return [list(describe(compose(17, number), 17)) for number in range(200)] + WRITTEN


@pytest.fixture(scope="module")
def reward(references, tokenizer):
    return CiderReward.of(references, tokenizer)


def pieces(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


class Theirs:
    """pycocoevalcap in its corpus mode over `references`, for captions of any of their images."""

    def __init__(self, references) -> None:
        self.scorer = CiderScorer()
        self.cooked = [cook_refs([" ".join(ptb_tokenize(caption)) for caption in captions]) for captions in references]
        self.scorer.crefs = self.cooked
        self.scorer.compute_doc_freq()

    def score(self, images, texts) -> np.ndarray:
        """One caption for each of `images`, x100. compute_cider takes log(number of images) from len(crefs), and stops with the
        captions."""
        scores = []
        for image, text in zip(images, texts, strict=True):
            self.scorer.ctest = [cook_test(" ".join(ptb_tokenize(text)))]
            self.scorer.crefs = [self.cooked[image]] + self.cooked[1:]
            scores += self.scorer.compute_cider()
        return np.array(scores) * 100


@pytest.fixture(scope="module")
def theirs(references):
    return Theirs(references)


def samples(references, tokenizer, images, k, seed=5) -> list[list[list[int]]]:
    """Captions as an untrained, a half trained and a good captioner draw them: any pieces, changed captions, and references."""
    draw = random.Random(seed)
    vocabulary = range(5, tokenizer.get_vocab_size())  # behind the special tokens
    marks = [tokenizer.token_to_id(piece) for piece in ".,-'?&<(;"]

    def one(image: int) -> list[int]:
        kind = draw.random()
        if kind < 0.1:
            return draw.choices(vocabulary, k=draw.randint(1, 20))
        own = draw.choice(references[image if kind < 0.7 else draw.randrange(len(references))])
        ids = pieces(tokenizer, own)
        if ids and kind > 0.2:
            for _ in range(draw.randint(0, 3)):
                at = draw.randrange(len(ids))
                change = draw.choice([[], [ids[at]] * 3, [draw.choice(marks)], [draw.choice(vocabulary)]])
                ids = (ids[:at] + change + ids[at + 1 :]) or [ids[0]]
        return ids

    return [[one(image) for _ in range(k)] for image in images]


def compare(reward, theirs, tokenizer, images, sampled) -> np.ndarray:
    got = reward(images, sampled)
    assert got.shape == (len(images), len(sampled[0])) and got.dtype == np.float64
    texts = [decode_caption(tokenizer, ids) for captions in sampled for ids in captions]
    np.testing.assert_allclose(got.ravel(), theirs.score(np.repeat(images, len(sampled[0])), texts), rtol=0, atol=1e-9)
    return got


def test_rewards_are_pycocoevalcaps(references, tokenizer, reward, theirs):
    images = [*random.Random(1).sample(range(200), 60), 200, 201, 202, 203]
    got = compare(reward, theirs, tokenizer, images, samples(references, tokenizer, images, 5))
    assert (got > 50).mean() > 0.3 and (got == 0).any() and len(np.unique(got)) > 200


def test_rewards_of_written_captions(tokenizer, reward, theirs):
    images = [200, 201, 202, 203]
    for captions in WRITTEN:
        compare(reward, theirs, tokenizer, images, [[pieces(tokenizer, text) for text in captions]] * 4)


def test_rewards_with_bert_s_word_pieces():
    """On the captions of the shared data where it is present, on other scenes than above where it is not."""
    path = DATA / "flickr8k" / "dataset_flickr8k.json"
    if path.is_file():
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        references = [[sentence["raw"] for sentence in image["sentences"]] for image in images if image["split"] == "train"][:2000]
    else:
        references = [list(describe(compose(23, number), 23)) for number in range(400)]
    minilm = load_tokenizer("minilm")
    chosen = random.Random(2).sample(range(len(references)), 32)
    sampled = samples(references, minilm, chosen, 5)
    got = compare(CiderReward.of(references, minilm), Theirs(references), minilm, chosen, sampled)
    assert np.median(got) > 20


def test_the_scale_is_that_of_the_scores(references, tokenizer, reward):
    """One caption for each training image: then the reward is `per_image` of the same captions."""
    sampled = [[pieces(tokenizer, captions[0])] for captions in references[1:] + references[:1]]
    texts = [decode_caption(tokenizer, ids) for ids, in sampled]
    expected = metrics.score(texts, references).per_image
    np.testing.assert_allclose(reward(range(len(references)), sampled)[:, 0], expected, rtol=0, atol=1e-9)
    assert expected.max() > 20


def test_captions_without_tokens_have_no_reward(tokenizer, reward):
    marks = pieces(tokenizer, ". , !")
    got = reward([0, 202], [[[], marks, marks[:1]]] * 2)  # image 202 has references without tokens too
    assert got.tolist() == [[0.0] * 3] * 2


def test_a_lone_reference_said_again_has_all_of_the_reward(tokenizer):
    words = CiderReward.of([["a red dog runs home"], ["two cats sleep"], ["A bird"]], tokenizer)
    assert words([0], [[pieces(tokenizer, "A red dog runs home.")]])[0, 0] == pytest.approx(1000, abs=1e-9)
    # Of three words there are n-grams of three orders, of two words of two.
    said = [[pieces(tokenizer, "two cats sleep")], [pieces(tokenizer, "a bird")]]
    assert words([1, 2], said).ravel().tolist() == pytest.approx([750, 500], abs=1e-9)


def test_n_grams_that_no_reference_has_weigh_as_rare_ones(references, tokenizer, reward, theirs):
    own = references[7][0]
    texts = [own, own + " zebra", own + " zebra yak", own + " zebra zebra", "zebra yak zebra yak", own + " zebra yak zebra yak"]
    got = compare(reward, theirs, tokenizer, [7], [[pieces(tokenizer, text) for text in texts]])[0]
    assert "zebra" not in reward.numbers and "yak" not in reward.numbers
    assert got[0] > got[1] > got[2] and got[4] == 0 and got[3] < got[2]


def test_references_of_one_word_have_no_longer_n_grams(tokenizer):
    references = [["dog"], ["cat"], ["dog", "bird"]]
    words = CiderReward.of(references, tokenizer)
    texts = ["dog", "dog cat", "a dog and a cat", "bird"]
    got = compare(words, Theirs(references), tokenizer, [0, 1, 2], [[pieces(tokenizer, text) for text in texts]] * 3)
    assert got[0, 0] == pytest.approx(250) and got[1, 0] == 0


def test_a_reward_has_the_same_bits_in_every_batch(references, tokenizer, reward):
    images = random.Random(3).sample(range(len(references)), 24)
    sampled = samples(references, tokenizer, images, 4)
    whole = reward(images, sampled)
    assert (whole == reward(np.array(images), sampled)).all()
    assert (whole == CiderReward.of(references, tokenizer)(images, sampled)).all()
    assert (whole[::-1] == reward(images[::-1], sampled[::-1])).all()
    for row, image in enumerate(images):
        for column, ids in enumerate(sampled[row]):
            assert reward([image], [[ids]])[0, 0] == whole[row, column]
    longer = pieces(tokenizer, "zebra " * 40)  # widens the tables, and numbers unknown words otherwise
    assert (whole == reward([5, *images], [[longer] * 4, *sampled])[1:]).all()
    twice = reward([images[0], images[0]], [sampled[0], sampled[0][::-1]])
    assert (twice[0] == whole[0]).all() and (twice[1] == whole[0, ::-1]).all()


def test_no_images_and_no_captions_are_no_rewards(reward):
    assert reward([], []).shape == (0, 0)
    assert reward([3, 4], [[], []]).shape == (2, 0)


def test_it_refuses_what_does_not_fit(tokenizer, reward):
    for few in ([], [["a dog", "a cat"]]):  # of one image all words weigh nothing
        with pytest.raises(DataError, match=f"there are {len(few)} training images to reward captions by"):
            CiderReward.of(few, tokenizer)
    with pytest.raises(DataError, match="training image 1 has no captions"):
        CiderReward.of([["a dog"], []], tokenizer)
    with pytest.raises(DataError, match="training image 0 are one text"):
        CiderReward.of(["a dog", "a cat"], tokenizer)
    with pytest.raises(ValueError, match="2 images cannot have the sampled captions of 1"):
        reward([0, 1], [[[7]]])
    with pytest.raises(ValueError, match=r"not \[1, 2\]"):
        reward([0, 1], [[[7]], [[7], [8]]])
    for image in (-1, 204):
        with pytest.raises(ValueError, match="the training images are 0 to 203"):
            reward([image], [[[7]]])


def test_agreement_is_the_metric_against_the_others(references, tokenizer):
    """Leave one out, with the document frequencies of all; one caption alone counts as the mean does."""
    references = references[:200:4] + WRITTEN
    whole = metrics.CiderD(references)
    known = {"document_frequencies": whole.document_frequencies, "num_documents": len(references)}
    wanted = []
    for captions in references:
        for place, caption in enumerate(captions):
            others = captions[:place] + captions[place + 1 :]
            wanted.append(metrics.CiderD([others], **known).score([caption])[0] if others else np.nan)
    found, mean = CiderReward.of(references, tokenizer).agreement(), np.nanmean(wanted)
    np.testing.assert_allclose(found, np.where(np.isnan(wanted), 1.0, np.array(wanted) / mean), atol=1e-9)
    assert found.mean() == pytest.approx(1.0) and found.min() >= 0 and found.max() > 2
    for strangers in ([["a dog"], ["two cats run"]], [["a dog", "two cats"], ["red hats", "one bus"]]):
        assert (CiderReward.of(strangers, tokenizer).agreement() == 1).all()
