"""Progress, as a terminal and as a file see it."""

import io

import pytest

from compress.context import Progress, Task


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_bars_and_then_lines():
    stream = Terminal()
    progress = Progress(stream=stream)
    with progress.task("outer", 10) as outer:
        with progress.task("inner") as inner:
            inner.advance(2)
        outer.advance(4, "loss 0.1")
        progress.log("[b] is said as it is")
    said = stream.getvalue()
    assert "outer: 4/10" in said and "inner: 2" in said and "[b] is said as it is" in said
    with pytest.raises(KeyboardInterrupt), progress.task("stopped", 3):
        raise KeyboardInterrupt
    before = stream.getvalue()
    progress.log("a line of its own")  # no bar is left alive
    assert stream.getvalue() == before + "a line of its own\n"


@pytest.mark.parametrize(("seconds", "brief", "said"), [
    (4.0, True, []),
    (4.0, False, ["captions: 2/2, 0.25/s, done in 8 s"]),
    (12.0, True, ["captions: 1/2, 0.0833/s, 12 s left", "captions: 2/2, 0.0833/s", "captions: 2/2, 0.0833/s, done in 24 s"]),
])
def test_elsewhere_long_work_has_lines_and_brief_progress_none_of_short_work(monkeypatch, seconds, brief, said):
    now = [0.0]
    monkeypatch.setattr("compress.context.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream=stream, brief=brief).task("captions", 2) as task:
        for _ in range(2):
            now[0] += seconds
            task.advance()
    assert stream.getvalue().splitlines() == said


def test_what_was_done_before_a_kill_is_not_in_the_rate(monkeypatch):
    clock = iter([0.0, *[10.0] * 20])
    monkeypatch.setattr("compress.context.time.monotonic", lambda: next(clock))
    task = Task("teacher", 100, lambda task: None)
    task.resume(60)
    task.advance(20)
    assert task.line() == "teacher: 80/100, 2/s, 10 s left"
    clock = iter([0.0, *[100.0] * 20])
    large = Task("images", 2_265_740, lambda task: None)
    large.advance(226_574)
    assert large.line() == "images: 226574/2265740, 2266/s, 15 min 00 s left"
