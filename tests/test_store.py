"""Arrays on disk that go on after a kill."""

import errno
import os

import numpy as np
import pytest

from compress.context import Task
from compress.training.store import found, stored


class Killed(Exception):
    pass


def test_a_store_goes_on_after_a_kill(tmp_path):
    calls = []

    def fill(start: int, stop: int, kill: int | None = None) -> np.ndarray:
        if start == kill:
            raise Killed
        calls.append(start)
        return np.arange(start, stop, dtype=np.float32)[:, None] * np.ones(3, np.float32)

    with pytest.raises(Killed):
        stored(tmp_path, "k", (10, 3), "float32", 4, lambda a, b: fill(a, b, 8))
    assert found(tmp_path, "k") is None and calls == [0, 4]
    task = Task("k", 10, lambda task: None)
    array = stored(tmp_path, "k", (10, 3), "float32", 4, fill, task)
    assert calls == [0, 4, 8] and task.done == 10 and task.before == 8  # what was done before is no part of the rate
    assert array[:, 1].tolist() == list(range(10)) and array.shape == (10, 3)
    assert not array.flags.writeable
    again = stored(tmp_path, "k", (10, 3), "float32", 4, fill)
    assert calls == [0, 4, 8] and np.array_equal(again, array)
    assert np.array_equal(found(tmp_path, "k"), array)
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]


def test_a_store_has_its_room_before_it_is_filled(tmp_path, monkeypatch):
    def fill(start: int, stop: int) -> np.ndarray:
        assert (tmp_path / "k.partial").stat().st_blocks * 512 >= 1000 * 1000 * 4
        return np.zeros((stop - start, 1000), np.float32)

    assert stored(tmp_path, "k", (1000, 1000), "float32", 1000, fill).shape == (1000, 1000)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: 0.004 GB are needed: '.*/full.partial'"):
        stored(tmp_path, "full", (1000, 1000), "float32", 1000, fill)
    assert not (tmp_path / "full.partial").exists()

    def unable(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    assert stored(tmp_path, "other", (2, 2), "float32", 2, lambda start, stop: np.ones((2, 2), np.float32)).sum() == 4


def test_a_store_that_was_killed_before_its_first_block(tmp_path):
    with pytest.raises(Killed):
        stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: (_ for _ in ()).throw(Killed))
    array = stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: np.full((b - a, 2), a, np.float32))
    assert array.tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]]


def test_a_store_takes_no_count_of_one_that_is_gone(tmp_path):
    """Stopped between naming the array and removing its count; then the array is deleted, and a second attempt stopped at once."""
    (tmp_path / "k.json").write_text('{"rows": 4}')
    for _ in range(2):
        with pytest.raises(Killed):
            stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: (_ for _ in ()).throw(Killed))
    assert stored(tmp_path, "k", (4, 2), "float32", 2, lambda a, b: np.ones((b - a, 2), np.float32)).sum() == 8
