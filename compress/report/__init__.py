"""One HTML file that needs no network: the rows of the runs as a table, CIDEr against megabytes and milliseconds, and how rows differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress import comparison, show
from compress.artifact import write_text
from compress.errors import ModelError

WIDTH, HEIGHT, MARGIN = 560, 340, 48
LINE, LETTER = 12, 7  # pixels of a label: its height, and a letter's width
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def write(value: Mapping, path: Path) -> None:
    """Writes the report of what `comparison.compared` says to `path`. ModelError where the folder cannot be written."""
    from jinja2 import Environment, PackageLoader

    flat, images, best = comparison.drawn(value)
    runs = list(dict.fromkeys(run for run, _ in flat))
    colours = [COLOURS[runs.index(run) % len(COLOURS)] for run, _ in flat]
    rows = [
        {"run": run, "colour": colour, "cells": show.cells(row), "best": index in best}
        for index, ((run, row), colour) in enumerate(zip(flat, colours, strict=True))
    ]
    drawn = [(row, colour, measured_on) for (_, row), colour, measured_on in zip(flat, colours, images, strict=True)]
    charts = [
        _chart(drawn, "MB on disk", lambda row: None if row.get("bytes") is None else row["bytes"] / 1e6, lambda row: None),
        _chart(drawn, "ms per caption, median", lambda row: (row.get("latency_ms") or {}).get("p50"),
               lambda row: (row.get("latency_ms") or {}).get("runtime")),
    ]
    environment = Environment(loader=PackageLoader("compress", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template("report.html.j2")
    legend = [{"run": run, "colour": COLOURS[number % len(COLOURS)]} for number, run in enumerate(runs)]
    text = template.render(rows=rows, headings=show.HEADINGS, charts=[chart for chart in charts if chart], legend=legend,
                           differences=[(entry["run"], *comparison.cells(entry)) for entry in value["differences"]],
                           against=value["runs"][0]["run"] if value["runs"] else "")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe, or a device
        else:
            write_text(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from None


def _chart(drawn: Sequence[tuple[Mapping, str, object]], title: str, cost, alike) -> dict | None:
    """Pixel positions of one scatter: points with their intervals, lines of rows that no other beats, and ticks. `drawn`: each row, its
    colour, the images it was measured on. Rows are compared on the same images, where they are `alike` (in time: of one runtime)."""
    kept = [(row, colour, images, cost(row)) for row, colour, images in drawn if row.get("cider") is not None and cost(row) is not None]
    if not kept:
        return None
    groups: dict[object, list[tuple[float, float]]] = {}
    for row, _, images, x in kept:
        groups.setdefault((images, row.get("split"), row.get("images"), alike(row)), []).append((x, row["cider"]))
    intervals = [row.get("cider_ci95") or (row["cider"], row["cider"]) for row, *_ in kept]
    across = _scale([x for *_, x in kept] + [0.0], MARGIN, WIDTH - 12)
    up = _scale([value for interval in intervals for value in interval], HEIGHT - MARGIN, 12)
    points = [
        {
            "x": across["place"](x),
            "y": up["place"](row["cider"]),
            "low": up["place"](low),
            "high": up["place"](high),
            "colour": colour,
            "label": row["name"],
            "said": f"{row['name']}: CIDEr {row['cider']:.1f}, {title} {x:.1f}",
        }
        for (row, colour, _, x), (low, high) in zip(kept, intervals, strict=True)
    ]
    return {
        "title": title,
        "width": WIDTH,
        "height": HEIGHT,
        "margin": MARGIN,
        "line": LINE,
        "points": [point | label for point, label in zip(points, labels(points), strict=True)],
        "lines": [" ".join(f"{across['place'](x)},{up['place'](y)}" for x, y in frontier(group)) for group in groups.values()],
        "across": across["ticks"],
        "up": up["ticks"],
    }


def labels(points: Sequence[Mapping]) -> list[dict]:
    """Where each point's label stands: beside the point, or as far below as labels that stand there already leave room. Points at one place
    with one name share a label, and what finds no room above the axis has none: its `text` is empty."""
    placed: list[tuple[float, float, float]] = []  # left, right, baseline
    found: list[dict] = [{}] * len(points)
    known: set[tuple] = set()
    for number, point in sorted(enumerate(points), key=lambda pair: pair[1]["y"]):
        wide = LETTER * len(point["label"])
        after = point["x"] + 7 + wide <= WIDTH
        left = point["x"] + 7 if after else point["x"] - 7 - wide
        level = point["y"] + 4
        among = [other[2] for other in placed if other[0] < left + wide and left < other[1]]
        while near := [other for other in among if abs(other - level) < LINE - 0.1]:  # but for the last digits
            level = round(max(near) + LINE, 1)
        place = (point["x"], point["y"], point["label"])
        shown = level <= HEIGHT - MARGIN and place not in known
        if shown:
            known.add(place)
            placed.append((left, left + wide, level))
        text = point["label"] if shown else ""
        found[number] = {"text": text, "anchor": "start" if after else "end", "beside": left if after else left + wide, "level": level}
    return found


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, CIDEr) that no cheaper or equal one reaches, by cost."""
    kept: list[tuple[float, float]] = []
    for cost, cider in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or cider > kept[-1][1]:
            kept.append((cost, cider))
    return kept


def _scale(values: Sequence[float], start: float, end: float) -> dict:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or 1.0
    low, high = (low if low == 0 else low - room), high + room

    def place(value: float) -> float:
        return round(start + (value - low) / (high - low) * (end - start), 1)

    step = _step((high - low) / 5)
    first = -(-low // step)
    ticks = []
    while (first + len(ticks)) * step <= high:
        value = (first + len(ticks)) * step
        ticks.append({"place": place(value), "text": f"{value:g}"})
    return {"place": place, "ticks": ticks}


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** int(f"{rough:e}".partition("e")[2])
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
