"""Gradients of depthwise convolutions: oneDNN's own beside those of students/lightcap/depthwise.py, in turn, in one run

    python benchmarks/depthwise.py [--images 16] [--repeats 15] [--precision bf16] [--json]

Every depthwise convolution of EfficientNet-Lite0 at 224x224, of the input and of the weight, with channels last. The last line is one JSON
document; with --json it is the only one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress.memory import keep
from compress.runtime import positive
from students.lightcap import depthwise
from students.lightcap.encoder import Lite0

SIZE = 224
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOTALS = ("input_ms", "input_ours_ms", "weight_ms", "weight_ours_ms")


def shapes(images: int) -> list[tuple[str, depthwise.DepthwiseConv2d, tuple[int, ...]]]:
    """(name, module, the shape of its padded input) of each depthwise convolution, by a pass of blank pictures."""
    found, net = [], Lite0().eval()

    def note(name: str, module: depthwise.DepthwiseConv2d, x: Tensor) -> None:
        n, channels, height, width = x.shape
        if module.stride[0] > 1:
            height, width = (
                size + sum(depthwise.missing(size, module.kernel_size[0], module.stride[0])) for size in (height, width)
            )
        found.append((name, module, (images, channels, height, width)))

    for name, module in net.named_modules():
        if isinstance(module, depthwise.DepthwiseConv2d):
            module.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, inputs[0]))
    with torch.inference_mode():
        net(torch.zeros(1, 3, SIZE, SIZE))
    return found


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other in every round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if round_:
                taken[name].append(1000 * (time.perf_counter() - began))
    return taken


def row(name: str, module: depthwise.DepthwiseConv2d, shape: tuple[int, ...], repeats: int, dtype: torch.dtype) -> dict:
    kernel, stride, padding = module.kernel_size[0], module.stride[0], 0 if module.stride[0] > 1 else module.padding[0]
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, kernel, kernel, dtype=dtype)
    gradient = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, stride, padding, 1, shape[1]))
    taken = in_turn({
        "input": lambda: depthwise.input_gradient(gradient, x, weight, stride, padding),
        "input_ours": lambda: depthwise.gradient_of_input(gradient, x, weight, stride, padding),
        "weight": lambda: depthwise.weight_gradient(gradient, x, kernel, stride, padding),
        "weight_ours": lambda: depthwise.gradient_of_weight(gradient, x, kernel, stride, padding),
    }, repeats)
    medians = {f"{name}_ms": round(statistics.median(values), 3) for name, values in taken.items()}
    spread = {f"{name}_q1_q3_ms": [round(q, 3) for q in statistics.quantiles(values, n=4)[::2]] for name, values in taken.items()}
    return {"layer": name, "shape": list(shape), "kernel": kernel, "stride": stride} | medians | spread


def line(row: dict) -> str:
    kernel = f"{row['kernel']}x{row['kernel']} / {row['stride']}, {row['shape'][1]:4} x {row['shape'][2]:3}"
    gradients = [f"{name} {row[f'{name}_ms']:6.2f} -> {row[f'{name}_ours_ms']:5.2f} ms" for name in ("input", "weight")]
    return f"{row['layer']:24} {kernel}: {', '.join(gradients)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=positive, default=16)
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles are of several")
    keep()  # as training does: the pages of freed memory are not taken anew at every call
    rows = []
    for name, module, shape in shapes(asked.images):
        rows.append(row(name, module, shape, asked.repeats, PRECISIONS[asked.precision]))
        if not asked.json:
            print(line(rows[-1]), flush=True)
    total = {key: sum(row[key] for row in rows) for key in TOTALS}
    ratios = {name: round(total[f"{name}_ms"] / total[f"{name}_ours_ms"], 2) for name in ("input", "weight")}
    document = {"benchmark": "depthwise", "torch": torch.__version__, "threads": torch.get_num_threads(), "images": asked.images,
                "precision": asked.precision}
    print(json.dumps(document | {"rows": rows, "total": {key: round(value, 2) for key, value in total.items()}, "ratios": ratios}))


if __name__ == "__main__":
    main()
