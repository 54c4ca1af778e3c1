"""Milliseconds of a step's rewards in self-critical training: 32 images with 5 sampled captions each, word-piece ids in, CIDEr-D out.

    python benchmarks/reward.py [--images 6000 ...] [--batches 50]

References are five captions of each training image: those of generated scenes (178 different words), and benchmarks/cider.py's sentences
of 8,000 made-up words. These words are spelled in pieces, so that such captions are twice as long in pieces as those of photos. A sampled
caption is a reference of its image, or of another, with some of its pieces exchanged. Beside it stands what a reward should cost less
than: the sampling of as many captions of 12 pieces from the fusion of LightCap-40M over 10,000 pieces (random weights, no concepts), from
grids. All times are CPU time, which a busy machine does not stretch as it does the clock's. pycocoevalcap is given the tokens, its counted
references and its document frequencies; it is left out where it is not installed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cider import captions as sentences

from compress.cost import TOKENS
from compress.data.scenes import compose
from compress.data.wording import describe
from compress.decode import Special, sample
from compress.ptb import ptb_tokenize
from compress.runtime import positive
from compress.training.reward import CiderReward
from students.lightcap import LightCap, preset
from students.lightcap.tokenizer import decode_caption, load_tokenizer

SEED = 17
BATCH, SAMPLES = 32, 5
SOURCES = {
    "scenes": lambda images: [describe(compose(SEED, number), SEED) for number in range(images)],
    "sentences": lambda images: sentences(images, 5)[1],
}


def batches(references: Sequence[Sequence[str]], tokenizer, count: int) -> Iterator[tuple[list[int], list[list[list[int]]]]]:
    """`count` times the numbers of 32 images and the ids of 5 captions for each."""
    draw = random.Random(SEED)

    def sampled(image: int) -> list[int]:
        near = image if draw.random() < 0.7 else draw.randrange(len(references))
        ids = tokenizer.encode(draw.choice(references[near]).rstrip(" ."), add_special_tokens=False).ids
        return [draw.choice(ids) if draw.random() < 0.1 else piece for piece in ids]

    for _ in range(count):
        images = draw.sample(range(len(references)), min(BATCH, len(references)))
        yield images, [[sampled(image) for _ in range(SAMPLES)] for image in images]


def timed(run: Callable, *arguments):
    start = time.process_time()
    result = run(*arguments)
    return 1000 * (time.process_time() - start), result


def pycocoevalcap_score(references: Sequence[Sequence[str]]) -> Callable[[Sequence[int], Sequence[str]], np.ndarray]:
    """pycocoevalcap's CIDEr-D, x100, of tokenized captions, with the document frequencies of all `references`."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

    scorer = CiderScorer()
    cooked = [cook_refs([" ".join(ptb_tokenize(caption)) for caption in captions]) for captions in references]
    scorer.crefs = cooked
    scorer.compute_doc_freq()

    def score(images: Sequence[int], captions: Sequence[str]) -> np.ndarray:
        # compute_cider takes the number of documents from the length of crefs, and pairs them with ctest from the front.
        scorer.ctest = [cook_test(caption) for caption in captions]
        scorer.crefs = ([cooked[image] for image in images] + cooked)[: len(cooked)]
        return np.array(scorer.compute_cider()) * 100

    return score


def measure(source: str, images: int, count: int) -> dict:
    references = SOURCES[source](images)
    tokenizer = load_tokenizer("english")
    build, reward = timed(CiderReward.of, references, tokenizer)
    steps = list(batches(references, tokenizer, count + 1))
    ours, rewards = zip(*(timed(reward, *step) for step in steps), strict=True)
    arrays = (reward.tokens, reward.starts, reward.first, reward.norms, *reward.codes, *reward.weights)
    row = {
        "source": source,
        "images": images,
        "ngrams": sum(map(len, reward.weights)) - len(reward.weights),
        "build_s": round(build / 1000, 2),
        "index_mb": round(sum(part.nbytes for part in arrays) / 1e6, 1),
    } | spread("ms", ours)
    print(f"{source}, {images} images: built in {row['build_s']} s, {row['index_mb']} MB, {row['ngrams']} n-grams")
    print(f"  ours, from ids                {line(ours)}   mean reward {np.mean(rewards):.1f}")
    if importlib.util.find_spec("pycocoevalcap") is not None and images >= BATCH * SAMPLES:
        score = pycocoevalcap_score(references)
        theirs, difference = [], 0.0
        for (numbers, captions), got in zip(steps, rewards, strict=True):
            tokens = [" ".join(ptb_tokenize(decode_caption(tokenizer, ids))) for each in captions for ids in each]
            milliseconds, expected = timed(score, np.repeat(numbers, SAMPLES).tolist(), tokens)
            theirs.append(milliseconds)
            difference = max(difference, float(np.abs(expected - got.ravel()).max()))
        row |= spread("pycocoevalcap_ms", theirs) | {"largest_difference": difference}
        print(f"  pycocoevalcap, from tokens    {line(theirs)}   largest difference {difference:.1e}")
    return row


def sampling(count: int) -> list[float]:
    """CPU milliseconds of drawing 160 captions, `count` times."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = LightCap(preset("lightcap", vocabulary=10_000, encoder="resnet-small", image_size=112, concepts=0)).eval()
    grid = torch.randn(BATCH, model.config.grid**2, model.config.channels)
    return [timed(sample, model, grid, Special(1, 2, ()), SAMPLES, TOKENS, seed)[0] for seed in range(count)]


def spread(name: str, milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and maximum without the first batch."""
    low, middle, high = statistics.quantiles(milliseconds[1:], n=4)
    found = {name: middle, f"{name}_q1": low, f"{name}_q3": high, f"{name}_max": max(milliseconds[1:])}
    return {key: round(value, 3) for key, value in found.items()}


def line(milliseconds: Sequence[float]) -> str:
    median, low, high, most = spread("", milliseconds).values()
    return f"{median:8.2f} ms   quartiles {low:.2f} to {high:.2f}   at most {most:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, nargs="+", default=[6000])
    parser.add_argument("--batches", type=positive, default=50)
    arguments = parser.parse_args()
    if arguments.batches < 2:
        parser.error("--batches must be at least 2: quartiles are of several")
    rows = [measure(source, images, arguments.batches) for source in SOURCES for images in arguments.images]
    drawn = sampling(min(arguments.batches, 10))
    print(f"drawing as many captions        {line(drawn)}")
    times = spread("ms", drawn)
    whole = [row for row in rows if row["images"] >= BATCH]  # as many captions as are drawn
    ratios = {f"sampling / ours, {row['source']}, {row['images']}": round(times["ms"] / row["ms"], 1) for row in whole} | {
        f"pycocoevalcap / ours, {row['source']}, {row['images']}": round(row["pycocoevalcap_ms"] / row["ms"], 1)
        for row in rows
        if "pycocoevalcap_ms" in row
    }
    found = {"images_per_batch": BATCH, "captions_per_image": SAMPLES, "rows": rows, "sampling": times, "ratios": ratios}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
