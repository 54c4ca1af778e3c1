"""METEOR and SPICE, which exist as Java programs only: run through pycocoevalcap where it, Java and the models are there.

Nothing is downloaded. pycocoevalcap would fetch SPICE's Stanford models at the first use; here SPICE is left out without them.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from compress.ptb import ptb_tokenize

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def missing() -> list[str]:
    """What METEOR and SPICE lack here, a line each with how to mend it; empty where both can run."""
    lines = []
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        lines.append("METEOR and SPICE: the package pycocoevalcap is not installed; pip install pycocoevalcap")
    if shutil.which("java") is None:
        lines.append("METEOR and SPICE: there is no java on the PATH; install a Java runtime (8 or newer)")
    if spec is not None:
        library = Path(next(iter(spec.submodule_search_locations or [""]))) / "spice" / "lib"
        absent = [name for name in SPICE_MODELS if not (library / name).is_file()]
        if absent:
            lines.append(
                f"SPICE: {' and '.join(absent)} not in pycocoevalcap/spice/lib; "
                "python -m pycocoevalcap.spice.get_stanford_models downloads them"
            )
    return lines


def extra_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"meteor": ..., "spice": ...} times 100 of one raw caption per image, with the keys of what can run here: `missing()` says why not.

    Raises DataError for no captions or a different number of candidates and references.
    """
    from compress.errors import DataError

    if not len(candidates) or len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions cannot be scored against the references of {len(references)} images")
    lacking = missing()
    if any(line.startswith("METEOR") for line in lacking):
        return {}
    truth = {index: [" ".join(ptb_tokenize(caption)) for caption in captions] for index, captions in enumerate(references)}
    result = {index: [" ".join(ptb_tokenize(caption))] for index, caption in enumerate(candidates)}
    scores = {"meteor": _meteor(truth, result)}
    if not lacking:
        from pycocoevalcap.spice.spice import Spice

        scores["spice"] = float(Spice().compute_score(truth, result)[0]) * 100
    return scores


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
