"""EfficientNet-Lite0's training on a CPU: torch's own operations beside those of students/lightcap/convolution.py, in turn, in one run

    python benchmarks/convolution.py [--images 16] [--repeats 15] [--precision bf16] [--json]

Gradients of every depthwise convolution at 224x224, of the input and of the weight; and the whole encoder, its norms folded: a training
pass, forward and backward, and a pass that reads. Channels last. The last line is one JSON document; with --json it is the only one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress.memory import keep
from compress.runtime import positive
from students.lightcap import convolution
from students.lightcap.convolution import ClippedReLU, SameConv2d
from students.lightcap.encoder import Lite0
from students.lightcap.norms import folded

SIZE = 224
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
GRADIENTS, PASSES = ("input", "weight"), ("train", "read")


def shapes(images: int) -> list[tuple[str, SameConv2d, tuple[int, ...]]]:
    """(name, module, the shape of its padded input) of each depthwise convolution, by a pass of blank pictures."""
    found, net = [], Lite0().eval()

    def note(name: str, module: SameConv2d, x: Tensor) -> None:
        n, channels, height, width = x.shape
        if module.stride[0] > 1:
            height, width = (
                size + sum(convolution.missing(size, module.kernel_size[0], module.stride[0])) for size in (height, width)
            )
        found.append((name, module, (images, channels, height, width)))

    for name, module in net.named_modules():
        if isinstance(module, SameConv2d) and module.groups > 1:
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


def row(name: str, module: SameConv2d, shape: tuple[int, ...], repeats: int, dtype: torch.dtype) -> dict:
    kernel, stride, padding = module.kernel_size[0], module.stride[0], 0 if module.stride[0] > 1 else module.padding[0]
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, kernel, kernel, dtype=dtype)
    gradient = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, stride, padding, 1, shape[1]))
    taken = in_turn({
        "input": lambda: convolution.input_gradient(gradient, x, weight, stride, padding),
        "input_ours": lambda: convolution.gradient_of_input(gradient, x, weight, stride, padding),
        "weight": lambda: convolution.weight_gradient(gradient, x, kernel, stride, padding),
        "weight_ours": lambda: convolution.gradient_of_weight(gradient, x, kernel, stride, padding),
    }, repeats)
    return {"layer": name, "shape": list(shape), "kernel": kernel, "stride": stride} | timed(taken)


@contextlib.contextmanager
def torchs_own() -> Iterator[None]:
    """Inside, convolutions and ReLU6 are torch's."""
    ours = convolution.backward_follows, ClippedReLU.forward
    convolution.backward_follows, ClippedReLU.forward = lambda x: False, torch.nn.ReLU6.forward
    try:
        yield
    finally:
        convolution.backward_follows, ClippedReLU.forward = ours


def whole(images: int, repeats: int, dtype: torch.dtype) -> dict:
    """The row of the encoder: milliseconds of a training pass, and of one that reads."""
    net = Lite0().eval().to(memory_format=torch.channels_last)
    pixels = torch.randn(images, 3, SIZE, SIZE).to(memory_format=torch.channels_last)

    def train(scope: contextlib.AbstractContextManager) -> None:
        with scope, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            net(pixels).float().square().mean().backward()
        net.zero_grad()

    def read(scope: contextlib.AbstractContextManager) -> None:
        with scope, torch.inference_mode():
            net(pixels)

    with folded(net, SIZE):
        taken = in_turn({
            "train": lambda: train(torchs_own()), "train_ours": lambda: train(contextlib.nullcontext()),
            "read": lambda: read(torchs_own()), "read_ours": lambda: read(contextlib.nullcontext()),
        }, repeats)
    return {"layer": "whole encoder", "shape": list(pixels.shape)} | timed(taken)


def timed(taken: dict[str, list[float]]) -> dict:
    """Medians and quartiles, by name."""
    medians = {f"{name}_ms": round(statistics.median(values), 3) for name, values in taken.items()}
    return medians | {f"{name}_q1_q3_ms": [round(q, 3) for q in statistics.quantiles(values, n=4)[::2]] for name, values in taken.items()}


def line(row: dict, names: tuple[str, str]) -> str:
    what = f"{row['kernel']}x{row['kernel']} / {row['stride']}, {row['shape'][1]:4} x {row['shape'][2]:3}" if "kernel" in row else ""
    times = ", ".join(f"{name} {row[f'{name}_ms']:6.2f} -> {row[f'{name}_ours_ms']:5.2f} ms" for name in names)
    return f"{row['layer']:24} {what:21}: {times}"


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
            print(line(rows[-1], GRADIENTS), flush=True)
    total = {key: sum(row[key] for row in rows) for name in GRADIENTS for key in (f"{name}_ms", f"{name}_ours_ms")}
    rows.append(whole(asked.images, asked.repeats, PRECISIONS[asked.precision]))
    if not asked.json:
        print(line(rows[-1], PASSES), flush=True)
    ratios = {name: round(found[f"{name}_ms"] / found[f"{name}_ours_ms"], 2)
              for found, names in ((total, GRADIENTS), (rows[-1], PASSES)) for name in names}
    document = {"benchmark": "convolution", "torch": torch.__version__, "threads": torch.get_num_threads(), "images": asked.images,
                "precision": asked.precision}
    print(json.dumps(document | {"rows": rows, "total": {key: round(value, 2) for key, value in total.items()}, "ratios": ratios}))


if __name__ == "__main__":
    main()
