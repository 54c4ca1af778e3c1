"""Seconds of CIDEr-D: 5,000 captions against 25,000 references, tokenization included, beside pycocoevalcap's Python scorer without it.

    python benchmarks/cider.py [--images 5000] [--references 5] [--repeats 3]

The text is generated: English-like sentences with a Zipf-like vocabulary. The last line is a JSON document; pycocoevalcap's time is
null where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress.metrics import CiderD, ptb_tokenize
from compress.runtime import positive

DETERMINERS = "a a a the the two some one this".split()
JOINS = "on in with near over under beside and behind at".split()
SYLLABLES = "ba ten ri lo mar ket sun dro ve pol li gra ser ton wick mal ow en der fa".split()


def vocabulary(size: int, draw: random.Random) -> list[str]:
    """Distinct made-up words of two to four syllables, the short ones first."""
    words = {"".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))): None for _ in range(2 * size)}
    return sorted(words, key=len)[:size]


def captions(images: int, references: int, seed: int = 17) -> tuple[list[str], list[list[str]]]:
    """(candidates, references): an image has a scene of a few words that its captions share."""
    draw = random.Random(seed)
    words = vocabulary(8000, draw)
    weights = np.cumsum(1 / np.arange(1, len(words) + 1)).tolist()

    def sentence(scene: list[str]) -> str:
        parts = []
        for _ in range(draw.randint(2, 4)):
            noun = draw.choice(scene) if draw.random() < 0.6 else draw.choices(words, cum_weights=weights)[0]
            parts.append(f"{draw.choice(DETERMINERS)} {draw.choices(words, cum_weights=weights)[0]} {noun}")
        text = parts[0] + "".join(f" {draw.choice(JOINS)} {part}" for part in parts[1:])
        if draw.random() < 0.1:
            text = text.replace(" ", ", ", 1) if draw.random() < 0.5 else text.replace(" ", "'s ", 1)
        if draw.random() < 0.03:
            text += ' "' + draw.choice(words) + '" (1/2)'
        return text.capitalize() + draw.choice([" .", ".", ""])

    scenes = [draw.choices(words, cum_weights=weights, k=5) for _ in range(images)]
    return [sentence(scene) for scene in scenes], [[sentence(scene) for _ in range(references)] for scene in scenes]


def best(repeats: int, run) -> tuple[float, np.ndarray]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        scores = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=5000)
    parser.add_argument("--references", type=positive, default=5)
    parser.add_argument("--repeats", type=positive, default=3)
    arguments = parser.parse_args()
    candidates, references = captions(arguments.images, arguments.references)

    seconds, ours = best(arguments.repeats, lambda: CiderD(references).score(candidates))
    print(f"ours, tokenization included          {seconds:8.3f} s   CIDEr-D {100 * ours.mean():.2f}")

    scorer = CiderD(references)
    indexes = [index for index in range(min(32, arguments.images)) for _ in range(5)]
    sampled = [references[index][sample % arguments.references] for sample, index in enumerate(indexes)]
    reward, _ = best(20, lambda: scorer.score(sampled, indexes))
    print(f"ours, a step of {len(sampled)} sampled captions   {1000 * reward:8.3f} ms")

    theirs, difference = None, None
    if importlib.util.find_spec("pycocoevalcap") is not None:
        from pycocoevalcap.cider.cider import Cider

        truth = {i: [" ".join(ptb_tokenize(caption)) for caption in image] for i, image in enumerate(references)}
        result = {i: [" ".join(ptb_tokenize(caption))] for i, caption in enumerate(candidates)}
        theirs, expected = best(1, lambda: Cider().compute_score(truth, result)[1])
        difference = float(np.abs(expected - ours).max())
        print(f"pycocoevalcap, tokens given          {theirs:8.3f} s   largest difference {difference:.1e}")
    document = {
        "images": arguments.images,
        "references": arguments.images * arguments.references,
        "seconds": round(seconds, 4),
        "reward_ms": round(1000 * reward, 3),
        "pycocoevalcap_seconds": theirs and round(theirs, 4),
        "largest_difference": difference,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
