"""The ledger's rows, the rows that nothing beats, the table, the report drawn from them."""

import os
import re
import threading

import pytest
from rich.console import Console

from compress import card, comparison, ledger, report, show
from compress.errors import ModelError
from compress.recipe import read_recipe


def made(name, cider, megabytes, milliseconds, stage="train", runtime="torch"):
    return ledger.row(
        {
            "stage": stage,
            "name": name,
            "artifact": f"../.cache/{name}",
            "cider": cider,
            "cider_ci95": [cider - 2, cider + 2],
            "bytes": megabytes * 1e6,
            "params": 41_986_409,
            "gmacs_caption": 5.6,
            "latency_ms": {"p50": milliseconds, "p90": milliseconds, "threads": 1, "beam": 1, "runtime": runtime},
        }
    )


ROWS = [
    ledger.row({"stage": "baseline", "name": "nearest", "artifact": "../.cache/nearest", "cider": 20.0}),
    made("teacher", 50.0, 40.0, 100.0),
    made("worse", 49.0, 41.0, 100.0),  # the teacher is at least as good in all three
    made("student", 48.0, 20.0, 50.0),
    made("twin", 48.0, 20.0, 50.0),  # equal: neither beats the other
    made("int8", 47.0, 5.0, 60.0),
]


def test_rows_are_kept_exactly(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger.write(path, ROWS)
    assert ledger.read(path) == ROWS
    assert len(path.read_text().splitlines()) == len(ROWS)
    with pytest.raises(ValueError, match="not keys of a ledger row: cidre"):
        ledger.row({"cidre": 1})
    path.write_text('{"stage": "train"}\n')
    with pytest.raises(ModelError, match=r"ledger.jsonl:1: is not a ledger row"):
        ledger.read(path)
    path.write_text(path.read_text() + "{half")
    with pytest.raises(ModelError, match="is not a"):
        ledger.read(path)
    with pytest.raises(ModelError, match="is not a run: it is not a folder"):
        ledger.read_run(tmp_path / "none")


def test_pareto_keeps_what_nothing_beats():
    assert [ROWS[index]["name"] for index in comparison.pareto(ROWS)] == ["teacher", "student", "twin", "int8"]
    assert comparison.pareto([]) == []


def test_times_of_different_runtimes_are_not_compared():
    """The smaller and better one beats the other, though its time in another runtime is longer; a bigger one does not, however fast."""
    rows = [made("float", 47.0, 20.0, 50.0), made("int8", 47.0, 5.0, 60.0, runtime="onnxruntime")]
    assert comparison.pareto(rows) == [1]
    assert comparison.pareto([rows[0], made("large", 47.0, 30.0, 1.0, runtime="onnxruntime")]) == [0]
    assert comparison.pareto([rows[0], made("slow", 47.0, 5.0, 60.0)]) == [0, 1]
    splits = [made("float", 47.0, 20.0, 50.0) | {"split": "val"}, made("test", 57.0, 5.0, 5.0) | {"split": "test"}]
    assert comparison.pareto(splits) == [0, 1]  # nor is CIDEr of different splits
    counts = [made("float", 47.0, 20.0, 50.0) | {"images": 1000}, made("few", 57.0, 5.0, 5.0) | {"images": 100}]
    assert comparison.pareto(counts) == [0, 1]  # or of other images


def compared(runs):
    return {"runs": runs, "pareto": comparison.unbeaten(runs), "differences": []}


def test_each_runtime_and_split_has_a_line_of_its_own(tmp_path):
    rows = [made("float", 47.0, 20.0, 50.0), made("small", 46.0, 10.0, 40.0), made("int8", 48.0, 5.0, 60.0, runtime="onnxruntime")]
    drawn = {}
    for name, last in (("runtimes", rows[2]), ("splits", rows[2] | {"split": "test"})):
        report.write(compared([{"run": "a", "rows": [*rows[:2], last]}]), tmp_path / name)
        charts = (tmp_path / name).read_text().split("</svg>")
        drawn[name] = [[len(line.split()) for line in re.findall(r'<polyline points="([^"]*)"', chart)] for chart in charts[:2]]
    assert drawn == {"runtimes": [[1], [2, 1]], "splits": [[2, 1], [2, 1]]}  # in megabytes the last beats both, where it may


def test_the_table_shows_the_rows():
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(show.table(ROWS))
    text = console.export_text()
    assert re.search(r"nearest +│ +20.0 │", text)
    assert re.search(r"teacher +│ +50.0 \[48.0, 52.0\] │ +│ +41.99M │ +5.600 │ +40.00 │ +100.0 │", text)


def test_the_report_is_one_file_without_a_network(tmp_path):
    path = tmp_path / "report.html"
    runs = [{"run": "runs/<a>", "rows": ROWS}, {"run": "runs/b", "rows": [ROWS[0], ROWS[1] | {"name": "other"}]}]
    report.write(compared(runs), path)
    text = path.read_text()
    assert "runs/&lt;a&gt;" in text and "<a>" not in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert text.count("<svg") == 2 and text.count("<circle") == 2 * 6  # the baseline has no size
    assert text.count('class="best"') == 5
    assert text.count("<tr") == 1 + len(ROWS) + 1 and text.count("every run") == 2  # the baseline, once, and in the legend
    with pytest.raises(ModelError, match="cannot be written"):
        report.write(compared([]), tmp_path / "none" / "report.html")


def test_a_report_is_written_where_a_link_or_a_pipe_leads(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "www" / "report.html")
    report.write(compared([]), tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "www" / "report.html").read_text().startswith("<!doctype html>")
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    report.write(compared([]), tmp_path / "pipe")
    reader.join(10)
    assert read == [(tmp_path / "www" / "report.html").read_text()] and (tmp_path / "pipe").is_fifo()


def test_the_frontier_of_the_picture():
    points = [(3.0, 50.0), (1.0, 40.0), (2.0, 39.0), (1.0, 41.0)]
    assert report.frontier(points) == [(1.0, 41.0), (3.0, 50.0)]


def test_labels_of_points_at_one_place_stand_below_each_other():
    points = [{"x": 100.0, "y": y, "label": label} for y, label in ((50.0, "b"), (48.0, "a"), (48.0, "a"), (200.0, "far"), (56.0, "c"))]
    found = report.labels([*points, {"x": 555.0, "y": 50.0, "label": "right"}])
    assert [(label["text"], label["level"]) for label in found if label["text"]] == [
        ("b", 64.0), ("a", 52.0), ("far", 204.0), ("c", 76.0), ("right", 54.0)
    ]
    assert [label["anchor"] for label in found] == ["start"] * 5 + ["end"] and found[2]["text"] == ""
    moved = report.labels([points[1] | {"label": "other"}, points[0], points[0]])  # shared also where it does not stand at its point
    assert [label["text"] for label in moved] == ["other", "b", ""]
    many = report.labels([{"x": 100.0, "y": 100.0 + number / 10, "label": f"stage-{number}"} for number in range(40)])
    assert sum(bool(label["text"]) for label in many) == 16 and all(label["level"] <= 292 for label in many if label["text"])


def test_the_card_holds_the_rows_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: {source: coco, captions: 'private/a.json,private/b.json', images: private}\nstudent: {preset: tiny}\n"
                    "stages:\n  - concepts: {as: found}\n  - train: {as: teacher, extractor: found}\n  - prune: {as: pruned, macs: 0.7}\n")
    recipe = read_recipe(path)
    values = ledger.row({"cider": 50.04, "cider_ci95": [46.0, 54.0], "bytes": 8.71e6, "params": 23_527_264, "delta_cider": -1.25,
                         "p_value": 0.5, "against": "teacher", "gmacs_caption": 1.5, "lock": "x",
                         "latency_ms": {"p50": 6.64, "p90": 9.0, "threads": 1, "beam": 1, "runtime": "torch"}})
    said = card.text(recipe, recipe.stages[2], values)
    for cell in ("50.0 (95 % interval 46.0 to 54.0)", "| 8.71 |", "| 23,527,264 |", "-1.25 (p = 0.5", "| 1.500 |",
                 "6.6 (torch, threads: 1, beam 1)", "captioned photos, `a.json, b.json`", "macs: 0.7",
                 "lightcap caption FOLDER PHOTO"):
        assert cell in said, cell
    assert "Note:" not in said and "\nNote: can saturate.\n" in card.text(recipe, recipe.stages[2], values, "can saturate")
    path.write_text(f"student: {{preset: tiny}}\nstages:\n  - concepts: {{as: found, vocabulary: {tmp_path / 'words.txt'}}}\n")
    recipe_ = read_recipe(path)
    listed = card.text(recipe_, recipe_.stages[0], values)
    assert "vocabulary: words.txt" in listed and str(tmp_path) not in listed
    assert "private" not in said and "lightcap caption" not in card.text(recipe, recipe.stages[0], values)
