"""What a captioner costs: parameters by part, multiply-accumulates per caption, milliseconds.

MACs are counted where they are dispatched (by torch's own formulas, with attention decomposed into its two matrix products), on meta
tensors, so nothing is computed. FLOPs are 2 x MACs. A caption is: encoder, prefix once, T cached steps.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from compress.artifact import Artifact
from students.lightcap import LightCap, LightCapConfig
from students.lightcap.concepts import windows

TOKENS = 12


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one caption: in the encoder, in the concept extractor, in the prefix and in the steps, and attention's
    products of activations. `pooling`: those of the extractor that pool windows, which weights have no part in."""

    encoder: int
    concepts: int
    prefix: int
    steps: int
    attention: int
    pooling: int = 0

    @property
    def caption(self) -> int:
        return self.encoder + self.concepts + self.prefix + self.steps + self.attention

    def gbops(self, bits: int) -> float:
        """Bit operations x 1e-9: MACs x weight bits x activation bits; products of activations stay in 32 bits."""
        single = self.attention + self.pooling
        return (bits * bits * (self.caption - single) + 32 * 32 * single) / 1e9


def count_macs(config: LightCapConfig, tokens: int = TOKENS) -> Macs:
    """MACs of one caption of `tokens` word pieces at beam 1; of a config that was counted lately, what was counted."""
    return counted_once(json.dumps(config.to_dict(), sort_keys=True), tokens)


@functools.lru_cache(maxsize=64)
def counted_once(written: str, tokens: int) -> Macs:
    """`written`: a config as JSON, since its shapes are a mapping."""
    config = LightCapConfig.from_dict(json.loads(written))
    with torch.device("meta"):
        model = LightCap(config).eval()
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        encoder, _ = counted(lambda: model.encode(pixels))
        grid = torch.zeros(1, config.grid**2, config.channels)
        concepts = torch.ones(1, config.concepts, dtype=torch.long) if config.concepts else None
        extraction, pooling = counted(lambda: extract(model, grid))
        past = []
        prefix, among = counted(lambda: past.append(model.prefill(grid, concepts)))

        def generate(position: int) -> None:
            past.append(model.step(torch.zeros(1, 1, dtype=torch.long), position, past[-1])[1])

        (step, first), (_, second) = (counted(lambda position=position: generate(position)) for position in (0, 1))
    # A step sees one place more than the one before it, so that two of them tell what attention takes in all.
    between = tokens * first + (second - first) * tokens * (tokens - 1) // 2
    return Macs(encoder, extraction + pooling, prefix, tokens * step, among + between, pooling)


def extract(model: LightCap, grid: torch.Tensor) -> None:
    """The concept extractor's work; of a preset, which does not say how many concepts there will be, that of its MLP alone."""
    if model.concepts is not None:
        model.concept_scores(grid)
    elif model.alignment is not None:
        model.alignment(grid, windows(model.config.grid))


class Counter(TorchDispatchMode):
    """Floating-point operations of what is dispatched within it, by operator. torch's FlopCounterMode gives the same numbers in up to
    twice the time: it follows modules, too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[object, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in flop_registry:
            self.flops[op] = self.flops.get(op, 0) + flop_registry[op](*args, **(kwargs or {}), out_val=out)
        return out


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """(products with weights, products of activations) of what `work` dispatches."""
    with torch.inference_mode(False), Counter() as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        work()
    attention = sum(count for op, count in counter.flops.items() if "bmm" in str(op))
    return (sum(counter.flops.values()) - attention) // 2, attention // 2


def parameters_by_part(model: LightCap) -> dict[str, int]:
    """Numbers of parameters. The output projection is the word embedding and is counted once, in `embeddings`."""
    grid = sum(p.numel() for p in model.fusion.grid.parameters())
    parts = {
        "encoder": count(model.encoder),
        "alignment": count(model.alignment),
        "modulator": count(model.modulator),
        "embeddings": sum(count(getattr(model.fusion, name)) for name in ("word", "position", "segment", "norm")),
        "layers": count(model.fusion.layers),
        "grid_projection": grid,
        "heads": count(model.heads),
    }
    return {name: number for name, number in parts.items() if number}


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


@torch.inference_mode()
def generate(model: LightCap, pixels: torch.Tensor, start: int, tokens: int = TOKENS) -> list[int]:
    """What is timed of a model in PyTorch: pixels (1, 3, S, S) to `start` and exactly `tokens` most probable pieces."""
    past = model.prefill(model.encode(pixels))
    pieces = [start]
    for position in range(tokens):
        logits, past = model.step(torch.tensor([pieces[-1:]]), position, past)
        pieces.append(int(logits[0].argmax()))
    return pieces


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved(works: Sequence[Callable[[int], object]], rounds: int, warm: int = 2) -> list[list[float]]:
    """Milliseconds of each of `works`, called in turn with the round's number, `rounds` times after `warm` unmeasured rounds."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(-warm, rounds):
        for index, work in enumerate(works):
            start = time.perf_counter()
            work(max(turn, 0))
            if turn >= 0:
                times[index].append((time.perf_counter() - start) * 1000)
    return times


def quantiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50": statistics.median(ordered), "p90": ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]}


def costs(artifact: Artifact, tokens: int = TOKENS) -> dict:
    """Parameters, MACs, bit operations, bytes. Graphs count as the float model they came from: their config still describes it."""
    config = LightCapConfig.from_dict(artifact.config)
    counted = costs_of(config, 8 if artifact.quantized else 32, tokens) | {"bytes": artifact.bytes()}
    if (artifact.config.get("quantized") or {}).get("float_parts"):
        counted["gbops_caption"] = None  # MACs are not counted by part
    return counted


def costs_of(config: LightCapConfig, bits: int = 32, tokens: int = TOKENS) -> dict:
    with torch.device("meta"):
        parts = parameters_by_part(LightCap(config))
    macs = count_macs(config, tokens)
    return {
        "params": sum(parts.values()),
        "params_by_part": parts,
        "gmacs_encoder": macs.encoder / 1e9,
        "gmacs_caption": macs.caption / 1e9,
        "gflops_caption": 2 * macs.caption / 1e9,
        "gbops_caption": macs.gbops(bits),
    }
