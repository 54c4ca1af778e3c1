"""Several processes that train one captioner, started as accelerate's launcher starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_recipes import COCO, coco, settings, small_bert

import compress
from compress.parallel import ALONE, Share, share
from compress.recipe import read_recipe

ROOT = Path(compress.__file__).resolve().parent.parent
RECIPE = """
name: many
seed: 5
data: {train_images: 32, val_images: 4}
student: {preset: tiny, heads: 2}
stages:
  - train:   {as: teacher, preset: tiny, encoder: tuned, word_weight: 0.1, epochs: 2, batch_images: 8}
  - distill: {as: student, init: weights, match: [tokens, hidden], epochs: 1, batch_images: 8}
  - scst:    {as: optimised, epochs: 0.5, batch_images: 8}
  - prune:   {as: pruned, macs: 0.9, recover_epochs: 1, batch_images: 8}
"""


def start(code: list[str], folder: Path, size: int, threads: str = "11") -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of `size` processes with the launcher's environment, each of so many `threads`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads[rank], "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
        }
        processes.append(subprocess.Popen([sys.executable, *code], cwd=folder, env=environment, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300) for process in processes]
        return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_shares_make_the_batch():
    images = np.array([3, 8, 9, 11, 20])
    shares = [Share(rank, 3).of(images).tolist() for rank in range(3)]
    assert shares == [[3, 11], [8, 20], [9]]
    assert [Share(rank, 3).of(images[:2]).tolist() for rank in range(3)] == [[3, 8]] * 3
    assert share() == ALONE and ALONE.of(images).tolist() == images.tolist()


def test_a_mean_over_some_images_of_a_batch_weighs_the_same_however_it_is_shared():
    items = {3: [1.0, 2.0], 20: [6.0], 9: [5.0]}  # of the others none

    def averaged(images, size):
        means = []
        for mine in (Share(rank, size) for rank in range(size)):
            own = [item for image in mine.of(images) for item in items.get(int(image), [])]
            weight = mine.weight(images, lambda image: len(items.get(image, [])))
            assert bool(weight) == bool(own)
            means.append(weight * np.mean(own) if own else 0.0)
        return np.mean(means)

    for size in (1, 2, 3, 5, 8):  # by 8, each has all of them
        assert averaged(np.array([3, 8, 9, 11, 20]), size) == pytest.approx(3.5)
    assert ALONE.weight([8, 11], lambda image: 0) == 0.0


STEPS = """
import sys, torch
from torch import nn
from compress.config import Optimisation
from compress.context import Progress
from compress.parallel import share
from compress.training.loop import Group, fit
from pathlib import Path
mine = share()
torch.manual_seed(0)
convolution = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # as encoders are tuned
net = nn.ModuleDict({"a": nn.Linear(6, 3), "b": convolution, "unused": nn.Linear(2, 2)})
data = torch.randn(6, 8, 4, 5, 5, generator=torch.Generator().manual_seed(1))
def loss_of(step):
    rows = mine.of(range(8))
    x = net["b"](data[step][rows].contiguous(memory_format=torch.channels_last))
    return (net["a"](x.mean((2, 3))) - 1).square().mean()
config = Optimisation(warmup=0.2, precision="fp32")
fit(net, [Group(list(net.parameters()), 0.05)], 6, loss_of, config, 3, Path("state"), "x", Progress(quiet=True), mine)
torch.save({k: v for k, v in net.state_dict().items()}, f"{sys.argv[1]}-{mine.rank}.pt")
"""


def test_two_processes_are_one(tmp_path):
    """Equal shares of a mean: the same weights as one process makes from the whole batch, in every process."""
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        done = start(["-c", STEPS, "net"], folder, size)
        assert [status for status, *_ in done] == [0] * size, done
    alone, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1/net-0.pt", "2/net-0.pt", "2/net-1.pt"))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight)
    assert [path.name for path in (tmp_path / "2/state").iterdir()] == ["x.safetensors"]


@pytest.mark.timeout(900)
def test_a_run_of_two_processes(tmp_path):
    """One ledger, written by the first; the second trains along, says nothing and leaves nothing; both find it cached afterwards."""
    (tmp_path / "many.yaml").write_text(RECIPE)
    command = ["-m", "compress", "run", "many.yaml", "--json"]
    (status, out, errors), (other, quiet, _) = start(command, tmp_path, 2)
    assert (status, other) == (0, 0), errors
    assert quiet == ""
    result = json.loads(out)
    assert result["ok"] and [row["name"] for row in result["ledger"]] == ["nearest", "teacher", "student", "optimised", "pruned"]
    kept = {path.name for path in (tmp_path / "runs/.cache").iterdir() if len(path.name) > 20}
    assert kept == {row["lock"] for row in result["ledger"]}
    locks = {row["name"]: row["lock"] for row in result["ledger"]}
    made = load_file(tmp_path / "runs/.cache" / locks["student"] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in made.values())
    again = start(command, tmp_path, 2)
    assert [status for status, *_ in again] == [0, 0] and json.loads(again[0][1])["ledger"] == result["ledger"]
    (status, *_), (other, _, said) = start(command, tmp_path, 2, threads="12")  # the first finds all of its own
    assert (status, other) == (0, 1) and "process 1 would make other artifacts" in said
    (alone, out, _), = start(["-m", "compress", "plan", "many.yaml", "--json"], tmp_path, 1)
    planned = json.loads(out)["stages"]  # another number of processes: other locks
    assert alone == 0 and {stage["lock"] for stage in planned}.isdisjoint({*kept, None}) and not any(stage["cached"] for stage in planned)


@pytest.mark.slow  # beside what is tested above, of a run that begins
def test_processes_that_would_make_different_things_stop(tmp_path):
    """The second would wait for an artifact that nobody makes, and average its gradients with those of another training."""
    (tmp_path / "many.yaml").write_text(RECIPE[: RECIPE.index("  - distill")])
    (status, out, _), (other, quiet, said) = start(["-m", "compress", "run", "many.yaml", "--json"], tmp_path, 2, threads="12")
    assert (status, other, quiet) == (1, 1, "") and not json.loads(out)["ok"]
    assert "lightcap: process 1 would make other artifacts than the first one; all need the same files" in said
    assert "cannot write" not in out
    assert not list((tmp_path / "runs").glob(".cache/*/metrics.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_paper_s_course_by_two_processes(tmp_path):
    """lightcap-coco on ten images: the concept extractor, masked pieces and matching, too; the last batch is smaller than the others."""
    coco(tmp_path)
    small_bert(tmp_path / "bert")
    command = ["-m", "compress", "run", "lightcap-coco", *settings(COCO), "--json"]
    (status, out, errors), (other, quiet, _) = start(command, tmp_path, 2)
    assert (status, other, quiet) == (0, 0, ""), errors
    result = json.loads(out)
    made = [stage.name for stage in read_recipe("lightcap-coco").stages]
    assert result["ok"] and [row["name"] for row in result["ledger"]] == ["nearest", *made]
    files = [tmp_path / "runs/.cache" / row["lock"] / "model.safetensors" for row in result["ledger"][1:-2]]
    assert all(torch.isfinite(tensor).all() for file in files for tensor in load_file(file).values() if tensor.is_floating_point())
