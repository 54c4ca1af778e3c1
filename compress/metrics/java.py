"""METEOR and SPICE, which exist as Java programs only: run through pycocoevalcap where it, Java and the models are there.

Nothing is downloaded. pycocoevalcap would fetch SPICE's Stanford models at the first use; here SPICE is left out without them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from compress.doctor import without_java
from compress.ptb import ptb_tokenize


def extra_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"meteor": ..., "spice": ...} times 100 of one raw caption per image, with the keys of what can run here (`doctor.without_java`).

    Raises DataError for no captions or a different number of candidates and references.
    """
    from compress.errors import DataError

    if not len(candidates) or len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions cannot be scored against the references of {len(references)} images")
    lacking = without_java()
    if any(scores.startswith("METEOR") for scores, _, _ in lacking):
        return {}
    truth = {index: [" ".join(ptb_tokenize(caption)) for caption in captions] for index, captions in enumerate(references)}
    result = {index: [" ".join(ptb_tokenize(caption))] for index, caption in enumerate(candidates)}
    scores = {"meteor": _meteor(truth, result)}
    if not lacking:
        from pycocoevalcap.spice.spice import Spice

        with _spoken_to_errors():
            scores["spice"] = float(Spice().compute_score(truth, result)[0]) * 100
    return scores


@contextlib.contextmanager
def _spoken_to_errors() -> Iterator[None]:
    """SPICE's program is started with our standard output, which is the command's result, and says there how long it took."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _meteor(truth: dict[int, list[str]], result: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return float(meteor.compute_score(truth, result)[0]) * 100
    finally:  # its destructor ends the process, but leaves the pipes open
        for pipe in (meteor.meteor_p.stdin, meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            pipe.close()
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
