"""CIDEr-D, BLEU and ROUGE-L against pycocoevalcap's own scorers, and the bootstrap against the normal interval."""

import random
import shutil
import subprocess
import sys
import types
from statistics import NormalDist

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from compress import doctor, metrics
from compress.errors import DataError
from compress.metrics import CiderD, bleu, bootstrap, java, rouge_l

WORDS = "a the dog cat man woman child red blue small runs sits stands on in with over grass street water ball hat and".split()


def corpus(images: int, seed: int = 3) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Token lists: candidates and references of random words, some candidates a reference, changed or with words that no reference has."""
    draw = random.Random(seed)
    sentence = lambda: [WORDS[int(len(WORDS) * draw.random() ** 2)] for _ in range(draw.randint(1, 14))]  # noqa: E731
    references = [[sentence() for _ in range(draw.randint(1, 6))] for _ in range(images)]
    candidates = []
    for captions in references:
        kind = draw.random()
        words = list(draw.choice(captions))
        if kind < 0.3:
            words = sentence()
        elif kind < 0.6:
            words[draw.randrange(len(words))] = draw.choice(["zebra", "xylophone", "the"])
            words += ["zebra", "zebra", "yak"][: draw.randint(0, 3)]
        candidates.append(words)
    return candidates, references


ODD_CANDIDATES = [
    [],
    ["dog"],
    ["zebra"],
    ["a", "a", "a", "a", "a", "a"],
    ["the", "dog"],
    [],
    ["zebra", "zebra", "yak", "yak", "zebra", "zebra"],
]
ODD_REFERENCES = [
    [["a", "dog"], ["the", "cat", "sits"]],
    [["dog"], ["a", "dog", "runs"]],  # one word
    [["a", "dog"], ["a", "dog"], ["a", "dog"]],  # the candidate is in no reference, and references repeat
    [["a", "a", "cat"], ["a", "a", "a"]],
    [["the", "dog"], ["the", "dog"]],  # equal to all of them
    [[], ["the"]],  # an empty candidate and an empty reference
    [["zebra"], ["a", "yak", "and", "a", "cat"]],
]


def as_dicts(candidates, references):
    truth = {index: [" ".join(caption) for caption in captions] for index, captions in enumerate(references)}
    return truth, {index: [" ".join(caption)] for index, caption in enumerate(candidates)}


@pytest.fixture(params=["random", "odd", "both", "one image"])
def case(request):
    candidates, references = corpus(120)
    if request.param == "odd":
        return ODD_CANDIDATES, ODD_REFERENCES
    if request.param == "both":
        return ODD_CANDIDATES + candidates, ODD_REFERENCES + references
    return (candidates[:1], references[:1]) if request.param == "one image" else (candidates, references)


def test_cider_d_equals_pycocoevalcap(case):
    mean, expected = Cider().compute_score(*as_dicts(*case))
    got = CiderD(case[1]).score(case[0])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    assert got.mean() == pytest.approx(mean, abs=1e-9)
    assert got.max() > 1 or len(case[0]) == 1  # something matched, except that a lone image's n-grams all weigh nothing


def test_bleu_equals_pycocoevalcap(case):
    expected, _ = Bleu(4).compute_score(*as_dicts(*case), verbose=0)
    np.testing.assert_allclose(bleu(*case), expected, rtol=0, atol=1e-9)


def test_rouge_l_equals_pycocoevalcap(case):
    _, expected = Rouge().compute_score(*as_dicts(*case))
    np.testing.assert_allclose(rouge_l(*case), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("n", "sigma"), [(1, 6.0), (2, 3.0), (4, 2.0)])
def test_cider_d_of_other_orders_and_widths(n, sigma):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    candidates, references = corpus(60, seed=n)
    scorer = CiderScorer(n=n, sigma=sigma)
    for candidate, captions in zip(candidates, references, strict=True):
        scorer += (" ".join(candidate), [" ".join(caption) for caption in captions])
    # pycocoevalcap counts n-grams up to 4 whatever n is, so its orders above n are cut off here.
    scorer.crefs = [[{gram: c for gram, c in ref.items() if len(gram) <= n} for ref in image] for image in scorer.crefs]
    scorer.ctest = [{gram: c for gram, c in test.items() if len(gram) <= n} for test in scorer.ctest]
    np.testing.assert_allclose(CiderD(references, n=n, sigma=sigma).score(candidates), scorer.compute_score()[1], rtol=0, atol=1e-9)


def test_indexes_choose_the_image():
    candidates, references = corpus(50)
    scorer = CiderD(references)
    every = scorer.score(candidates)
    chosen = [7, 3, 3, 49, 0]
    np.testing.assert_allclose(scorer.score([candidates[i] for i in chosen], chosen), every[chosen], rtol=0, atol=1e-12)
    # The same caption for another image is another score, that of a set in which it stands there.
    swapped = [candidates[1], candidates[0], *candidates[2:]]
    np.testing.assert_allclose(scorer.score(candidates[:2], [1, 0])[::-1], scorer.score(swapped)[:2], rtol=0, atol=1e-12)
    assert scorer.score([], []).shape == (0,)


def test_document_frequencies_of_another_set():
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    training = CiderD(corpus(200, seed=8)[1])
    candidates, references = corpus(40, seed=9)
    candidates[0] = candidates[0] + ["ostrich"]
    frequencies = training.document_frequencies
    assert frequencies[("the",)] > frequencies[("the", "dog")] > 0
    scorer = CiderScorer()
    for candidate, captions in zip(candidates, references, strict=True):
        scorer += (" ".join(candidate), [" ".join(caption) for caption in captions])
    scorer.document_frequency.update(frequencies)
    # compute_cider takes the logarithm of the number of its captions; the difference is undone by doubling the set to 200.
    scorer.crefs, scorer.ctest = scorer.crefs * 5, scorer.ctest * 5
    expected = np.array(scorer.compute_cider())[:40]
    got = CiderD(references, document_frequencies=frequencies, num_documents=training.num_documents).score(candidates)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    assert np.abs(got - CiderD(references).score(candidates)).max() > 0.01
    again = CiderD(references)
    same = CiderD(references, document_frequencies=again.document_frequencies, num_documents=again.num_documents)
    np.testing.assert_allclose(same.score(candidates), again.score(candidates), rtol=0, atol=1e-12)


def test_cider_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one image"):
        CiderD([])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        CiderD([["a dog"], []])
    with pytest.raises(ValueError, match="go together"):
        CiderD([["a dog"]], document_frequencies={("a",): 1})
    with pytest.raises(ValueError, match="5 documents of 2"):
        CiderD([["a dog"]], document_frequencies={("a",): 5}, num_documents=2)
    scorer = CiderD([["a dog"], ["a cat"]])
    with pytest.raises(ValueError, match="1 candidates for 2 images"):
        scorer.score(["a dog"])
    with pytest.raises(ValueError, match="outside"):
        scorer.score(["a dog"], [2])


TEXTS = ["A dog's ball (red) lies on the grass.", "Two men, one hat.", "a cat sits in a box"]
TRUTH = [
    ["The dog's red ball is on the grass.", "A ball on grass"],
    ["Two men share 1 hat!", "Men with a hat."],
    ["A cat sits in the box.", "a box with a cat", "The cat, in a box"],
]


def test_score_takes_texts_and_reports_hundredths():
    scores = metrics.score(TEXTS, TRUTH)
    candidates = [metrics.ptb_tokenize(text) for text in TEXTS]
    references = [[metrics.ptb_tokenize(text) for text in captions] for captions in TRUTH]
    truth, result = as_dicts(candidates, references)
    mean, per_image = Cider().compute_score(truth, result)
    np.testing.assert_allclose(scores.per_image, per_image * 100, rtol=0, atol=1e-7)
    assert scores.cider == pytest.approx(mean * 100, abs=1e-7) and scores.cider > 50
    expected = Bleu(4).compute_score(truth, result, verbose=0)[0]
    assert [scores.bleu1, scores.bleu2, scores.bleu3, scores.bleu4] == pytest.approx([100 * value for value in expected], abs=1e-7)
    assert scores.rouge_l == pytest.approx(Rouge().compute_score(truth, result)[0] * 100, abs=1e-7)
    assert scores.images == 3 and scores.cider_ci95[0] < scores.cider < scores.cider_ci95[1]
    assert list(scores.row()) == ["cider", "cider_ci95", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "images"]


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "no captions to score"),
        (["a dog"], [], "1 captions .* 0 images"),
        (["a dog", "a cat"], [["a dog"], []], "image 1 has no reference"),
        (["a dog"], ["a dog"], "one text"),
    ],
)
def test_score_refuses_empty_sets(candidates, references, message):
    with pytest.raises(DataError, match=message):
        metrics.score(candidates, references)


def test_mean_interval_is_the_normal_one():
    values = np.random.default_rng(0).gamma(2.0, 20.0, size=1200)
    low, high = bootstrap.mean_ci(values)
    half = NormalDist().inv_cdf(0.975) * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.08 * half)
    assert (low, high) == bootstrap.mean_ci(values) != bootstrap.mean_ci(values, seed=18)
    wide, narrow = bootstrap.mean_ci(values[:100]), bootstrap.mean_ci(values, level=0.5)
    assert wide[1] - wide[0] > 2 * (high - low) and narrow[1] - narrow[0] < 0.5 * (high - low)


def test_paired_p_value_is_that_of_the_normal_test():
    draw = np.random.default_rng(1)
    b = draw.normal(60, 30, size=900)
    noise = draw.normal(0, 10, size=900)
    noise -= noise.mean()
    error = noise.std() / 30
    for shift in (0.0, 1.5 * error, -2.2 * error):
        result = bootstrap.paired(b + noise + shift, b)
        assert result.delta == pytest.approx(shift, abs=1e-9)
        assert result.p_value == pytest.approx(2 * NormalDist().cdf(-abs(shift) / error), abs=0.02)
        assert result.ci95 == pytest.approx((shift - 1.96 * error, shift + 1.96 * error), abs=0.1 * error)
    # Pairing matters: the images differ by far more than the systems do.
    assert bootstrap.paired(b + noise + 5 * error, b).p_value < 0.001 < bootstrap.paired(np.roll(b, 1) + 5 * error, b).p_value


def test_paired_ends():
    same = bootstrap.paired(np.arange(5.0), np.arange(5.0))
    assert (same.delta, same.ci95, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    higher = bootstrap.paired(np.arange(50.0) + 0.3, np.arange(50.0), resamples=999)
    assert higher.delta == pytest.approx(0.3) and higher.p_value == pytest.approx(1 / 1000)
    assert bootstrap.paired(np.arange(50.0) + 0.3, np.arange(50.0)).p_value == pytest.approx(1 / 10_001)
    assert bootstrap.paired([5.0], [4.9]).p_value == 1.0 and bootstrap.paired([5.0, 1.0, 2.0], np.zeros(3)).p_value == 0.25
    with pytest.raises(ValueError, match="paired values of 2 and 3"):
        bootstrap.paired(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap.mean_ci(np.zeros(0))


@pytest.mark.slow
def test_java_metrics_run_or_say_what_is_missing():
    lacking = doctor.without_java()
    if shutil.which("java") is None:
        assert "java" in [what for _, what, _ in lacking]
        assert java.extra_scores(TEXTS, TRUTH) == {}
        return
    scores = java.extra_scores(TEXTS, TRUTH)
    assert ("spice" in scores) == (not any("SPICE" in of for of, _, _ in lacking))
    assert 20 < scores["meteor"] < 80  # near their references, but not equal
    with pytest.raises(DataError, match="cannot be scored"):
        java.extra_scores([], [])


def test_what_spice_says_is_no_part_of_the_result(monkeypatch, capfd):
    """Its program writes to the standard output that it is started with."""
    class Spice:
        def compute_score(self, truth, result):
            subprocess.run(["echo", "SPICE evaluation took: 1 s"], check=True)
            return 0.225, []

    monkeypatch.setattr(java, "without_java", lambda: [])
    monkeypatch.setattr(java, "_meteor", lambda truth, result: 31.0)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", types.SimpleNamespace(Spice=Spice))
    assert java.extra_scores(TEXTS, TRUTH) == {"meteor": 31.0, "spice": 22.5}
    print("the result")
    said = capfd.readouterr()
    assert said.out == "the result\n" and said.err == "SPICE evaluation took: 1 s\n"


def test_doctor_names_the_package_and_java_and_the_models(monkeypatch, tmp_path):
    both = "METEOR and SPICE"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (both, "java", "apt install default-jre-headless, or brew install openjdk") in doctor.without_java()
    assert java.extra_scores(TEXTS, TRUTH) == {}
    (tmp_path / "empty" / "pycocoevalcap").mkdir(parents=True)
    (tmp_path / "empty" / "pycocoevalcap" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty"), *sys.path])
    models = "stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar"
    assert ("SPICE", models, "python -m pycocoevalcap.spice.get_stanford_models") in doctor.without_java()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor.without_java()[0] == (both, "pycocoevalcap", "pip install 'lightcap[coco]'")
