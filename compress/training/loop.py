"""The one training loop: AdamW on a linear schedule, resumable at any step with the same result."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact import write_text
from compress.config import Optimisation
from compress.context import Progress
from compress.errors import StageError
from compress.memory import keep
from compress.parallel import ALONE, Share, until

SAVE_SECONDS = 20.0
SAVE_SHARE = 0.03  # of the time at most: on a slow disk a large state is saved less often,
MOST_SECONDS = 600.0  # but this often
NOTE_STEPS = 10
PRODUCTS = 20  # timed in each precision
PAYS = 0.8  # of the time in fp32: conversions take some of what bf16 saves


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float


def fit(
    modules: nn.Module, groups: Sequence[Group], steps: int, loss_of: Callable[[int], Tensor],
    config: Optimisation, seed: int, work: Path, label: str, progress: Progress, share: Share = ALONE,
) -> None:
    """Minimises `loss_of(step)`, of this process's share of each batch, over `steps` steps, in `config.precision`. `modules` holds
    everything that changes (buffers included).

    Randomness is a function of seed and step, so the only state is weights, buffers and moments: saved every SAVE_SECONDS (less often
    where that takes more than SAVE_SHARE of the time, but every MOST_SECONDS) to `work/LABEL.safetensors`, and read back when it is there.
    StageError where the loss, or a weight that would be saved, is not finite.
    """
    keep()
    optimizer = optimizer_of(groups, config)
    state = work / (label.replace(" ", "-").replace("/", "-of-") + ".safetensors")
    parameters = [p for group in groups for p in group.parameters]
    where = parameters[0].device
    chosen = settled(config.precision, where, work, share)
    start = load_state(modules, optimizer, state) if state.exists() else 0
    schedule = [linear(step, steps, config) for step in range(steps)]
    saved, pause = time.monotonic(), SAVE_SECONDS
    with progress.task(label, steps) as task:
        task.resume(start)
        for step in range(start, steps):
            torch.manual_seed(seed * 1_000_003 + step + share.rank * 1_000_000_007)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule[step]
            with autocast(chosen, where):
                loss = loss_of(step)
            if not torch.isfinite(loss):
                raise StageError(f"{label}: the loss is {loss.item()} at step {step + 1} of {steps}; lower learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            share.average(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=True)
            optimizer.step()
            task.advance(1, f"loss {loss.item():.3f}" if step % NOTE_STEPS == 0 else "")
            if share.rank == 0 and (began := time.monotonic()) - saved > pause:
                check_finite(parameters, label, step + 1, steps)
                save_state(modules, optimizer, state, step + 1)
                saved = time.monotonic()
                pause = min(max(SAVE_SECONDS, (saved - began) / SAVE_SHARE), MOST_SECONDS)
    check_finite(parameters, label, steps, steps)
    if share.rank == 0:
        save_state(modules, optimizer, state, steps)


def check_finite(parameters: Sequence[nn.Parameter], label: str, step: int, steps: int) -> None:
    """StageError where a gradient, or a step, has lost the weights: a run that goes on from them, or ends with them, would be lost too.
    Not asked after each step, where a GPU would be waited for: the next loss tells."""
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise StageError(f"{label}: not all weights are finite after step {step} of {steps}; lower learning_rate")


def optimizer_of(groups: Sequence[Group], config: Optimisation) -> torch.optim.AdamW:
    """Matrices decay; biases and norms do not."""
    split = []
    for group in groups:
        peak = {"peak": group.learning_rate}
        split.append({"params": [p for p in group.parameters if p.dim() > 1], "weight_decay": config.weight_decay} | peak)
        split.append({"params": [p for p in group.parameters if p.dim() <= 1], "weight_decay": 0.0} | peak)
    return torch.optim.AdamW(split, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def linear(step: int, steps: int, config: Optimisation) -> float:
    """The share of the peak learning rate: up over `warmup` of the steps, then down to `final_learning_rate`."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 1 - (1 - config.final_learning_rate) * (step - warm) / max(1, steps - warm)


def settled(name: str, where: torch.device, work: Path, share: Share = ALONE) -> str:
    """fp32 or bf16; `auto` is the `faster`. Chosen once for a stage, by the first of its processes, and kept in `work`: asked again after a
    stop, a clock could choose the other."""
    if name != "auto":
        return name
    note = work / "precision"
    if share.rank:
        until(note.exists)
    elif not note.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_text(note, faster(where))
    return note.read_text()


def faster(where: torch.device) -> str:
    """bf16 on a GPU that has it, and on a CPU whose bf16 products are the faster ones; else fp32."""
    if where.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if multiplies_faster_in_bf16() else "fp32"


def autocast(chosen: str, where: torch.device) -> torch.autocast:
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=chosen == "bf16")


@functools.cache
def multiplies_faster_in_bf16() -> bool:
    """Measured, since the flags do not tell: of two processors with AVX512-BF16 one multiplied bf16 2.2 times as fast as fp32, the other
    half as fast. Where there is no such instruction, bf16 is converted, and slower."""
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    with torch.autocast("cpu", enabled=False), torch.inference_mode():
        half, single = (product_seconds(dtype) for dtype in (torch.bfloat16, torch.float32))
    return half < PAYS * single


def product_seconds(dtype: torch.dtype) -> float:
    """The shortest of some products of the size of a feed-forward layer's over a batch."""
    left, right = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    times = []
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return min(times)


def save_state(modules: nn.Module, optimizer: torch.optim.Optimizer, path: Path, step: int) -> None:
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in modules.state_dict().items()}
    for index, parameter in enumerate(all_parameters(optimizer)):
        for name, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{index}.{name}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, str(temporary), metadata={"step": json.dumps(step)})
    temporary.replace(path)


def load_state(modules: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """The steps that are done."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        step = json.loads(file.metadata()["step"])
    modules.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for index, parameter in enumerate(all_parameters(optimizer)):
        mine = {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"optimizer.{index}.")}
        if mine:
            # The fused kernel walks memory: a moment must lie as its parameter does (channels last, for convolutions), and its count of
            # steps be where the parameter is.
            optimizer.state[parameter] = {
                n: t.to(parameter.device) if n == "step" else torch.empty_like(parameter).copy_(t) for n, t in mine.items()
            }
    return step


def all_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
