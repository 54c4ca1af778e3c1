"""Milliseconds from one image to a text of 12 word pieces on one thread: LightCap-40M by every route to it, its nearest limits, and BLIP
and GIT, in one process.

    python benchmarks/latency.py [--rounds 20] [--images 64] [--without-concepts] [--reduced] [--keep FOLDER]
                                 [--leave-out NAME ...]

No checkpoint of LightCap can be had: weights are random, of the preset `lightcap`, and its captions mean nothing. Everything that is
measured runs in turn, two pictures each, round after round, so that a change of the machine's speed meets all alike. README.md says what
each number is. The last line is one JSON document; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import neighbours

from compress import doctor, runtime
from compress.artifact import Artifact
from compress.context import Progress
from compress.cost import TOKENS
from compress.runtime import positive
from compress.training.start import read_captioner
from students.lightcap.tokenizer import decode_caption

WARM = 2
FIRST = "first"
Work = Callable[[np.ndarray], Iterator[str | None]]  # takes a picture and stops behind each phase with that phase's name


@dataclass(frozen=True)
class Subject:
    """Something to be timed: `costs` are its row's numbers beside the times."""

    name: str
    what: str
    work: Work
    costs: dict


# ---- LightCap, phase by phase


def eager(artifact: Artifact) -> Work:
    """PyTorch fp32: the prefix's keys and values once, one token a step over the cache, heads folded into one vocabulary product."""
    model, words, settings = read_captioner(artifact.path)
    start = words.token_to_id("[CLS]")

    def work(picture: np.ndarray) -> Iterator[str]:
        batch = torch.from_numpy(runtime.pixels(picture, settings)[None])
        yield "pixels"
        grid = model.encode(batch)
        yield "encoder"
        past = model.prefill(grid)
        yield "prefix"
        pieces = [start]
        for position in range(TOKENS):
            logits, past = model.step(torch.tensor([pieces[-1:]]), position, past)
            pieces.append(int(logits[0].argmax()))
        yield "steps"
        decode_caption(words, pieces)
        yield "text"

    return work


def graphs(artifact: Artifact) -> Work:
    """ONNX Runtime, as `caption.py` runs an export."""
    captioner = runtime.Captioner(artifact.path, threads=1)

    def work(picture: np.ndarray) -> Iterator[str]:
        batch = runtime.pixels(picture, captioner.settings)[None]
        yield "pixels"
        grid = captioner.encode(batch)
        yield "encoder"
        past = captioner.prefill(grid)
        yield "prefix"
        pieces = [captioner.start]
        for position in range(TOKENS):
            logits, past = captioner.step(pieces[-1:], position, past)
            pieces.append(int(logits[0].argmax()))
        yield "steps"
        captioner.tokenizer.decode(pieces, skip_special_tokens=True)
        yield "text"

    return work


def lightcap(folder: Path, images: int, with_concepts: bool, reduced: bool) -> list[Subject]:
    full, onnx, int8, half = (models.build(name, folder, images, with_concepts) for name in ("eager", "onnx", "int8", "pruned-int8"))
    narrow = {name: models.build(name, folder, images, with_concepts) for name in ("int8-reduced", "pruned-int8-reduced") if reduced}
    return [
        Subject("eager", "PyTorch fp32, cached prefix, folded heads, 30,522 pieces", eager(full), models.row(full)),
        Subject("onnx", "ONNX Runtime fp32, 30,522 pieces", graphs(onnx), models.row(onnx)),
        Subject("int8", "ONNX Runtime INT8 by the stage quantize, 10,000 pieces", graphs(int8), models.row(int8)),
        Subject("pruned-int8", "the same, of 3 of 4 layers, at most half its MACs, 0.6 of its weights", graphs(half), models.row(half)),
        *(Subject(name, "as without -reduced, by reduce_range: weights of 7 bits", graphs(made), models.row(made))
          for name, made in narrow.items()),
    ]


# ---- measuring


def measure(subjects: list[Subject], pictures: list[np.ndarray], rounds: int) -> dict[str, list[dict[str, tuple[float, float]]]]:
    """Per subject and round: phase -> (milliseconds by the clock, milliseconds of CPU time). A turn is two pictures, one after the other:
    the second one's phases count, and the first one's sum is `first`. Other models' weights, up to a gigabyte, have swept the caches before
    a turn; who captions photo after photo waits once for that."""
    found: dict[str, list[dict[str, tuple[float, float]]]] = {subject.name: [] for subject in subjects}
    with Progress().task("rounds", rounds + WARM) as task, torch.inference_mode():
        for turn in range(-WARM, rounds):
            for subject in subjects:
                first, second = (phases(subject.work(pictures[(turn + picture) % len(pictures)])) for picture in (0, 1))
                if turn >= 0:
                    found[subject.name].append(second | {FIRST: total(first)})
            task.advance()
    return found


def phases(work: Iterator[str | None]) -> dict[str, tuple[float, float]]:
    times, began = {}, (time.perf_counter(), time.process_time())
    for phase in work:
        now = time.perf_counter(), time.process_time()
        if phase is not None:  # what was done until here is not timed
            times[phase] = tuple(1000 * (a - b) for a, b in zip(now, began, strict=True))
        began = time.perf_counter(), time.process_time()
    return times


def total(times: dict[str, tuple[float, float]]) -> tuple[float, float]:
    clock, cpu = map(sum, zip(*times.values(), strict=True))
    return clock, cpu


def summary(times: list[dict[str, tuple[float, float]]]) -> dict:
    """Each phase's median and quartiles by the clock, and its median CPU time: a step's, where a text was made the whole caption's, and the
    turn's first picture's."""
    row = {}
    if "text" in times[0]:
        times = [one | {"caption": total({name: taken for name, taken in one.items() if name != FIRST})} for one in times]
    for phase in times[0]:
        name, per = ("step", TOKENS) if phase == "steps" else (phase, 1)
        clock, cpu = ([value / per for value in values] for values in zip(*(one[phase] for one in times), strict=True))
        low, middle, high = statistics.quantiles(clock, n=4)
        found = {"ms": middle, "ms_q1": low, "ms_q3": high, "cpu_ms": statistics.median(cpu)}
        row |= {f"{name}_{key}": round(value, 3) for key, value in found.items()}
    return row


RATIOS = {  # name: (part, numerator, denominator)
    "encoder_int8_vs_eager": ("encoder", "eager", "int8"),
    "step_int8_vs_eager": ("step", "eager", "int8"),
    "caption_int8_vs_eager": ("caption", "eager", "int8"),
    "caption_pruned_int8_vs_eager": ("caption", "eager", "pruned-int8"),
    "caption_int8_vs_blip_base": ("caption", "blip-base", "int8"),
    "caption_int8_vs_git_base": ("caption", "git-base", "int8"),
    "encoder_int8_vs_ort_static": ("encoder", "int8", "ort-static"),
    "encoder_int8_vs_openvino": ("encoder", "int8", "openvino"),
}


def ratios(rows: list[dict], unit: str) -> dict[str, float | None]:
    """The other's time over ours; against ONNX Runtime's quantizer and OpenVINO ours over theirs. None where one of the two is left out."""
    times = {row["name"]: row for row in rows}
    found = {}
    for name, (part, above, below) in RATIOS.items():
        there = above in times and below in times
        found[name] = round(times[above][f"{part}_{unit}"] / times[below][f"{part}_{unit}"], 3) if there else None
    return found


def left_out(asked: list[str]) -> dict[str, str]:
    """What is not measured, and why."""
    absent = {
        "openvino": "openvino is not installed: pip install 'lightcap[bench]'" if importlib.util.find_spec("openvino") is None else "",
    }
    return {name: why for name, why in absent.items() if why} | {name: "--leave-out" for name in asked}


def line(row: dict) -> str:
    parts = [f"{name} {row[f'{name}_ms']:8.2f}" for name in ("encoder", "prefix", "step", "caption") if f"{name}_ms" in row]
    last = "caption" if "caption_ms" in row else "encoder"
    size = f"   {row['bytes'] / 1e6:.1f} MB" if "bytes" in row else ""
    return f"{row['name']:19} ms: {'  '.join(parts)}   quartiles {row[f'{last}_ms_q1']:.2f} to {row[f'{last}_ms_q3']:.2f}{size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=positive, default=64, help="generated pictures for calibration and the importance of channels")
    parser.add_argument("--without-concepts", action="store_true", help="LightCap without concept extractor and modulator")
    parser.add_argument("--reduced", action="store_true", help="both INT8 models also with weights of 7 bits, which x86 processors without "
                        "VNNI multiply faster")
    parser.add_argument("--keep", type=Path, help="a folder where the models that are built stay, and are taken from next time")
    parser.add_argument("--leave-out", nargs="+", default=[], choices=neighbours.NAMES)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(1)
    absent = left_out(options.leave_out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        subjects = lightcap(folder, options.images, not options.without_concepts, options.reduced)
        onnx = models.build("onnx", folder, options.images, not options.without_concepts)
        for name, (what, work) in neighbours.build(onnx.path, options.images, set(absent)).items():
            subjects.append(Subject(name, what, work, {}))
        data = models.scenes(options.rounds)
        pictures = [data.image(example) for example in data.examples]
        times = measure(subjects, pictures, options.rounds)
    rows = [{"name": subject.name, "what": subject.what} | subject.costs | summary(times[subject.name]) for subject in subjects]
    for row in rows:
        print(line(row))
    for name, why in absent.items():
        print(f"{name:19} left out: {why}")
    document = {"tokens": TOKENS, "beam": 1, "threads": 1, "rounds": options.rounds, "machine": doctor.examine()["cpu"]["name"],
                "concepts": not options.without_concepts, "left_out": absent, "rows": rows, "ratios": ratios(rows, "ms"),
                "ratios_cpu": ratios(rows, "cpu_ms")}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
