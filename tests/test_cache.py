"""How long a stage may take, by what is finished in the cache."""

import json
import os

from compress.cache import durations, expected_seconds


def finished(folder, kind: str, tmacs: float | None, seconds: float, at: int) -> None:
    folder.mkdir()
    (folder / "lock.json").write_text(json.dumps({"tmacs": tmacs, "parts": {"kind": kind}}))
    (folder / "metrics.json").write_text(json.dumps({"seconds": seconds}))
    os.utime(folder / "lock.json", (at, at))


def test_a_stage_takes_as_long_as_one_of_its_size_did(tmp_path):
    """A tiny captioner keeps no processor busy: its rate is no large one's."""
    for at, (kind, tmacs, seconds) in enumerate([("train", 100.0, 50.0), ("train", 0.1, 2.0), ("distill", 1.0, 3.0), ("train", 0.1, 1.0),
                                                 ("baseline", None, 9.0), ("train", 0.0, 9.0)]):
        finished(tmp_path / str(at), kind, tmacs, seconds, at)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "lock.json").write_text("{")
    known = durations(tmp_path)
    assert known == {"train": [(100.0, 50.0), (0.1, 2.0), (0.1, 1.0)], "distill": [(1.0, 3.0)]}
    assert expected_seconds(known["train"], 300.0) == 150.0
    assert expected_seconds(known["train"], 2900.0) == 1450.0 and expected_seconds(known["train"], 3100.0) is None
    assert expected_seconds(known["distill"], 0.03) is None
    assert expected_seconds(known["train"], 0.05) == 0.5  # of two of one size the newest
    assert expected_seconds(known["train"], 0.0) is None and expected_seconds((), 1.0) is None
