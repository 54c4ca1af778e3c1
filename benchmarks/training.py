"""Captions per second of the photos recipe's teacher (stage `frozen`) and student, the plain way and this machine's peak, in one run

    python benchmarks/training.py [--images 160] [--steps 12] [--json]

The shipped stages run as `lightcap run photos` runs them, but without concepts (EfficientNet-Lite0 at 224x224, MiniLM fusion, word pieces
narrowed to those seen, three heads on three teachers' cached targets), on generated pictures with five captions of 10 to 13 words each.
After each training step the clock stops, and in turn come: a plain step, and one product of each of PEAK_SHAPES. Medians and quartiles
leave out the first WARM steps. README.md says what each number is. The last line is one JSON document; with --json it is the only one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress import cost, process
from compress.artifact import Artifact
from compress.config import Optimisation, Recipe
from compress.context import Context, Progress, Task
from compress.data.captions import CaptionSet, Example
from compress.recipe import read_recipe
from compress.runtime import positive
from compress.stages import distill, train
from compress.training import loop
from compress.training.batches import IGNORED, Batch, Captions, order, pack
from compress.training.features import device, normalised
from compress.training.loop import Group, faster, linear, optimizer_of
from compress.training.losses import token_loss
from compress.training.start import read_captioner
from students.lightcap import LightCap
from students.lightcap.dropout import Dropout
from students.lightcap.encoder import lite0_file
from students.lightcap.tokenizer import SPECIAL, characters, encode_captions, load_tokenizer, pieces_of

WORDS = 6700  # distinct words of the captions: as many as Flickr8k's use
VOCABULARY = 30522
CAPTIONS = 5
MODELS = {"frozen": "teacher", "student": "student"}  # of the stages that are measured
WARM = 2
PEAK_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (3584, 384, 1536))
SYLLABLES = "ba ten ri lo mar ket sun dro ve pol li gra ser ton wick mal ow en der fa".split()


# ---- pictures, captions, recipe


def photos(folder: Path) -> tuple[Recipe, bool]:
    """The shipped recipe, and whether its weights are installed: else they are random, and the vocabulary is made up."""
    recipe = read_recipe("photos")
    with contextlib.suppress(FileNotFoundError, ImportError, ValueError):
        lite0_file()
        load_tokenizer("minilm")
        return recipe, True
    pieces = [*SPECIAL, *characters()]
    words = ("".join(parts) for length in (2, 3, 4) for parts in itertools.product(SYLLABLES, repeat=length))
    pieces += itertools.islice(words, VOCABULARY - len(pieces))
    (folder / "vocab.txt").write_text("\n".join(pieces))
    student = dataclasses.replace(recipe.student, encoder_weights="none", tokenizer=str(folder / "vocab.txt"))
    return dataclasses.replace(recipe, student=student), False


def generated(count: int, tokenizer, seed: int = 17) -> CaptionSet:
    """`count` pictures of 224x224, each with captions of 10 to 13 words. Words are dealt like cards, so that all are used early."""
    words = [piece for piece in pieces_of(tokenizer) if piece.isalpha() and piece.isascii() and len(piece) > 1]
    draw = random.Random(seed)
    words = draw.sample(words, WORDS)

    def deal() -> Iterator[str]:
        while True:
            draw.shuffle(words)
            yield from words

    deck = deal()
    examples = [
        Example(f"{number:06d}", "train", tuple(" ".join(itertools.islice(deck, draw.randint(10, 13))) for _ in range(CAPTIONS)))
        for number in range(count)
    ]

    def read(example: Example) -> np.ndarray:
        coarse = np.random.default_rng(int(example.image_id)).integers(0, 256, (7, 7, 3), dtype=np.uint8)
        return np.kron(coarse, np.ones((32, 32, 1), np.uint8))

    return CaptionSet(tuple(examples), f"generated-{count}-{seed}", "generated", reader=read)


# ---- our step: the stages themselves, with a clock between their steps


class Clock(Progress):
    """A progress that times the steps of the task `label` and runs `between(step)` after each, outside of the time."""

    def __init__(self, label: str, between: Callable[[int], None]) -> None:
        super().__init__(quiet=True)
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "between", between)
        object.__setattr__(self, "seconds", [])

    @contextlib.contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        if label != self.label:
            yield Task(label, total, lambda task: None)
            return
        started: list[float] = []

        def step(task: Task) -> None:
            synchronise()
            if started:
                self.seconds.append(time.perf_counter() - started.pop())
                self.between(len(self.seconds) - 1)
            started.append(time.perf_counter())

        yield Task(label, total, step)


def run_stage(recipe: Recipe, name: str, data: CaptionSet, folder: Path, between: Callable[[int], None], **changes) -> list[float]:
    """Runs a stage of `recipe`, its settings changed by `changes`; seconds of each training step. The artifact is `folder / name`."""
    stage = next(stage for stage in recipe.stages if stage.name == name)
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, **changes))
    made = {path.name: Artifact(path) for path in folder.iterdir() if (path / "config.json").is_file()}
    clock = Clock(name, between)
    output = folder / name
    output.mkdir()
    context = Context(
        recipe=recipe, stage=stage, data=data, seed=recipe.seed, output=output, work=folder / f"{name}.work",
        cache=folder / "cache", artifacts=made, progress=clock,
    )
    (train if stage.kind == "train" else distill).run(None, stage.config, context)
    return clock.seconds


def multiply_accumulates(model: LightCap, batch: Batch, separate: bool) -> int:
    """MACs that one training step on `batch` needs: three times the forward pass, less the gradient of the frozen features. Padding is
    counted, since it is computed."""
    grid = torch.zeros(len(batch.images), model.config.grid**2, model.config.channels)
    real = batch.targets != IGNORED

    def forward() -> None:
        states = model.states(grid, batch.tokens, batch.positions, batch.mask(model.config.prefix))
        branches = model.heads.branch_states(states[real])
        F.linear(branches if separate else branches.mean(0), model.word)

    return 3 * sum(cost.counted(forward)) - grid.numel() * model.config.hidden


# ---- the plain step


class Plain:
    """Each caption a sequence with its own picture and prefix: the frozen encoder runs in every step, fp32, all 30,522 word pieces,
    torch's dropout. The losses are ours; a student's teacher targets are given to it as they are to ours, from memory."""

    def __init__(self, folder: Path, data: CaptionSet, config: Optimisation, images: int, steps: int, separate: bool, top_k: int) -> None:
        self.model, tokenizer, self.settings = read_captioner(folder)
        self.model = with_torch_dropout(copy.deepcopy(self.model), config.dropout).to(device()).train()
        self.model.encoder.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        encoded = [encode_captions(tokenizer, example.captions, self.model.config.max_tokens) for example in data.examples]
        self.captions = Captions.of([[caption] for captions in encoded for caption in captions])
        self.orders = order(Captions.of(encoded), images, 0, 17)
        self.pictures = np.stack([data.image(example) for example in data.examples])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.group = Group(trained, config.learning_rate)
        self.optimizer, self.config, self.steps = optimizer_of([self.group], config), config, steps
        self.separate, self.top_k = separate, top_k

    def step(self, number: int) -> tuple[float, float, int]:
        """Seconds in the encoder, seconds in all else, captions."""
        images = self.orders[number % len(self.orders)]
        rows = [CAPTIONS * int(image) + k for image in images for k in range(CAPTIONS)]
        where = device()
        began = time.perf_counter()
        batch = pack(self.captions, rows).to(where)
        with torch.no_grad():
            grid = self.model.encode(normalised(self.pictures[[row // CAPTIONS for row in rows]], self.settings, where))
        synchronise()
        encoded = time.perf_counter()
        real = batch.targets != IGNORED
        states = self.model.states(grid, batch.tokens, batch.positions, batch.mask(self.model.config.prefix))
        branches, targets = self.model.heads.branch_states(states[real]), batch.targets[real]
        branches = branches if self.separate else branches.mean(0, keepdim=True)
        logits = F.linear(branches, self.model.word, self.model.heads.bias)
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), label_smoothing=smoothing)
        if self.separate:
            ids, best = self.taught(logits)
            logs = logits.log_softmax(-1).gather(-1, ids)
            loss = (1 - self.config.token_weight) * loss + self.config.token_weight * token_loss(logs, best, 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.group.parameters, self.config.clip_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.group.learning_rate * linear(min(number, self.steps - 1), self.steps, self.config)
        self.optimizer.step()
        synchronise()
        return encoded - began, time.perf_counter() - encoded, len(rows)

    def taught(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Some top-k targets per head and place: which ones does not change the time."""
        first = torch.randint(VOCABULARY - self.top_k, logits.shape[:-1], device=logits.device).unsqueeze(-1)
        ids = first + torch.arange(self.top_k, device=logits.device)
        return ids, 0.9 * F.softmax(torch.randn(ids.shape, device=logits.device), -1)


def with_torch_dropout(model: LightCap, p: float) -> LightCap:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, nn.Dropout(p))
    return model


# ---- the machine


class Peak:
    """One product of each shape per call, in the precision that our step trains in; GFLOP/s of each."""

    def __init__(self) -> None:
        where = device()
        kind = torch.bfloat16 if faster(where) == "bf16" else torch.float32
        self.operands = [[torch.randn(size, device=where).to(kind) for size in ((m, k), (k, n))] for m, k, n in PEAK_SHAPES]
        self.rates: list[list[float]] = [[] for _ in PEAK_SHAPES]

    def measure(self) -> None:
        for (a, b), rates in zip(self.operands, self.rates, strict=True):
            synchronise()
            began = time.perf_counter()
            torch.mm(a, b)
            synchronise()
            rates.append(2e-9 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - began))

    def best(self) -> tuple[float, tuple[int, int, int]]:
        return max((statistics.median(rates[WARM:]), shape) for rates, shape in zip(self.rates, PEAK_SHAPES, strict=True))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


# ---- one model


def measured(name: str, recipe: Recipe, data: CaptionSet, folder: Path, steps: int, plain_images: int, changes: dict) -> tuple[dict, dict]:
    """The row and the ratios of stage `name`."""
    config = next(stage.config for stage in recipe.stages if stage.name == name)
    config = dataclasses.replace(config, epochs=1e-9, **changes)
    run_stage(recipe, name, data, folder, lambda step: None, **changes, epochs=1e-9)  # one step: fills features and targets
    separate = name == "student"
    made = folder / name
    plain = Plain(made, data, config, plain_images, steps, separate, getattr(config, "top_k", 0))
    peak, found = Peak(), []

    def between(step: int) -> None:
        found.append(plain.step(step))
        peak.measure()

    first = made.rename(folder / f"{name}-first")
    for leftover in (folder / f"{name}.work").glob("*"):
        leftover.unlink()
    per_epoch = -(-len(data) // config.batch_images)
    seconds = run_stage(recipe, name, data, folder, between, **changes, epochs=steps / per_epoch)[WARM:]
    model, tokenizer, _ = read_captioner(first)
    encoded = [encode_captions(tokenizer, example.captions, model.config.max_tokens) for example in data.examples]
    keep = sorted({piece for image in encoded for caption in image for piece in caption})
    place = {piece: index for index, piece in enumerate(keep)}
    captions = Captions.of([[[place[piece] for piece in caption] for caption in image] for image in encoded])
    model.narrow(torch.tensor(keep))
    batches = [pack(captions, images) for epoch in range(-(-steps // per_epoch)) for images in order(captions, config.batch_images, epoch,
               recipe.seed)][:steps]
    macs = [multiply_accumulates(model, batch, separate) for batch in batches[WARM:]]
    ours = [CAPTIONS * len(batch.images) / s for batch, s in zip(batches[WARM:], seconds, strict=True)]
    gflops = [2e-9 * count / s for count, s in zip(macs, seconds, strict=True)]
    theirs = [count / (encoder + rest) for encoder, rest, count in found[WARM:]]
    once = [count / (encoder / CAPTIONS + rest) for encoder, rest, count in found[WARM:]]
    best, shape = peak.best()
    row = {
        "model": name,
        "captions_per_second": spread(ours),
        "plain_captions_per_second": spread(theirs),
        "plain_encoded_once_captions_per_second": spread(once),
        "step_gflops": round(2e-9 * statistics.median(macs), 1),
        "gflop_per_second": spread(gflops),
        "peak_gflop_per_second": round(best, 1),
        "peak_shape": list(shape),
        "share_of_peak": round(statistics.median(gflops) / best, 3),
        "vocabulary": len(keep),
        "steps": len(seconds),
    }
    middle = statistics.median(ours)
    return row, {name: round(middle / statistics.median(theirs), 2), f"{name}_encoded_once": round(middle / statistics.median(once), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=160, help="generated pictures (160 use every word)")
    parser.add_argument("--steps", type=int, default=12, help=f"training steps, of which the first {WARM} are not counted")
    parser.add_argument("--plain-images", type=positive, default=8, help="pictures per plain step: 30,522 logits a piece take memory")
    parser.add_argument("--json", action="store_true", help="print the JSON document alone")
    arguments = parser.parse_args()
    if arguments.steps < WARM + 2:
        parser.error(f"--steps must be at least {WARM + 2}")
    loop.SAVE_SECONDS = math.inf  # the plain step between two of ours would bring a save into every few of these
    torch.set_num_threads(process.thread_count())
    say = (lambda text: None) if arguments.json else (lambda text: print(text, flush=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, real = photos(folder)
        data = generated(arguments.images, load_tokenizer(recipe.student.tokenizer))
        rows, ratios = [], {}
        plain = {"extractor": None} | ({} if real else {"fusion_weights": None})
        for stage, changes in (("frozen", plain), ("student", {"match": ("tokens",), "teachers": ("frozen",) * 3})):
            model = MODELS[stage]
            row, ratio = measured(stage, recipe, data, folder, arguments.steps, arguments.plain_images, changes)
            row["model"], ratio = model, {key.replace(stage, model): value for key, value in ratio.items()}
            rows.append(row)
            ratios |= ratio
            ours, plain = row["captions_per_second"], row["plain_captions_per_second"]
            say(
                f"{model:8s} {ours['median']:7.1f} captions/s [{ours['q1']:.1f}, {ours['q3']:.1f}]   plain {plain['median']:6.1f}"
                f" [{plain['q1']:.1f}, {plain['q3']:.1f}]   ratio {ratio[model]:.2f} ({ratio[f'{model}_encoded_once']:.2f} if the plain"
                f" way encodes an image once per step)   {row['gflop_per_second']['median']:.0f} of {row['peak_gflop_per_second']:.0f}"
                f" GFLOP/s: {100 * row['share_of_peak']:.0f} % of the peak"
            )
    where = device()
    machine = {
        "processor": torch.cuda.get_device_name() if where.type == "cuda" else processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "precision": faster(where), "weights": "pretrained" if real else "random",
        "images": arguments.images, "captions_per_image": CAPTIONS,
    }
    print(json.dumps({"rows": rows, "ratios": ratios, "machine": machine}))


if __name__ == "__main__":
    main()
