"""A run as Markdown: its ledger, and what its models say of images chosen by their number, not by taste.

    python benchmarks/results.py runs/photos [--images 12]

The images are every floor(N / 12)-th of the N in the run's val split, by their order in the caption file; no photo is copied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress import ledger
from compress.errors import LightcapError

MAIN_LINE = ("teacher", "teacher-cider", "student", "student-cider", "pruned", "pruned-cider", "int8")


def interval(values: Sequence[float] | None, form: str) -> str:
    return "" if values is None else f"[{values[0]:{form}}, {values[1]:{form}}]"


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value / scale, form)


def fusion(row: Mapping) -> int | None:
    """Parameters of the fusion's layers alone: without embeddings, encoder, grid projection and heads."""
    return (row.get("params_by_part") or {}).get("layers")


COLUMNS = {
    "name": lambda row: row["name"],
    "CIDEr": lambda row: f"{number(row['cider'], '.1f')} {interval(row['cider_ci95'], '.1f')}".strip(),
    "delta": lambda row: f"{number(row['delta_cider'], '+.1f')} {interval(row['delta_ci95'], '+.1f')}".strip(),
    "p": lambda row: "<0.001" if (row["p_value"] or 1) < 0.001 else number(row["p_value"], ".3f"),
    "BLEU-4": lambda row: number(row["bleu4"], ".1f"),
    "ROUGE-L": lambda row: number(row["rouge_l"], ".1f"),
    "params": lambda row: number(row["params"], ".2f", 1e6) + ("M" if row["params"] else ""),
    "in fusion layers": lambda row: number(fusion(row), ".2f", 1e6) + ("M" if fusion(row) else ""),
    "GMACs": lambda row: number(row["gmacs_caption"], ".3f"),
    "MB": lambda row: number(row["bytes"], ".2f", 1e6),
    "ms p50": lambda row: number((row["latency_ms"] or {}).get("p50"), ".1f"),
    "parent's ms": lambda row: number((row["parent_latency_ms"] or {}).get("p50"), ".1f"),
    "runtime": lambda row: (row["latency_ms"] or {}).get("runtime", ""),
    "peak MB": lambda row: number(row["peak_mb"], ".0f"),
    "seconds": lambda row: number(row["seconds"], ".0f"),
}


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], other: str) -> str:
    """GitHub's Markdown table; the first column is text, `other` is the mark of the rest."""
    marks = ["---", *(other for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (headings, marks, *lines))


def spoken(run: Path, rows: Sequence[Mapping], count: int) -> str:
    """The captions of `count` images, a row per image, by every model of the main line that the run has."""
    mine = [row for row in rows if row["name"] in MAIN_LINE]
    said = {row["name"]: ledger.captions(run, row) for row in mine}
    names = [name for name in MAIN_LINE if name in said]
    total = len(said[names[0]]) if names else 0
    chosen = range(0, total, max(1, total // count))[:count]
    captions = {name: {item["image"]: item["caption"] for item in items} for name, items in said.items()}
    lines = []
    for index in chosen:
        image = said[names[0]][index]["image"]
        lines.append([f"{index}: {image}", *(captions[name][image] for name in names)])
    return table(["image", *names], lines, "---")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--images", type=int, default=12, help="how many images to show the captions of")
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error("--images must be at least 1")
    try:
        rows = ledger.read_run(arguments.run)
        said = spoken(arguments.run, rows, arguments.images)
    except LightcapError as error:
        parser.exit(2, f"results.py: {error.message}\n")
    print(table(list(COLUMNS), [[cell(ledger.row(row)) for cell in COLUMNS.values()] for row in rows], "---:"))
    print()
    print(said)


if __name__ == "__main__":
    main()
