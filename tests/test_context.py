"""Progress, as a terminal and as a file see it."""

import io

import pytest

from compress.context import Progress


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
