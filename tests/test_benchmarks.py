"""What the benchmarks compute from their measurements, and how they measure: on tiny models and on made-up times."""

import dataclasses
import importlib
import importlib.util
import json
import os
import sys

import equality
import latency
import memory
import models
import neighbours
import numpy as np
import oracle
import prune
import pytest
import torch
import training
from conftest import BENCHMARKS
from quantized import Quantized

from compress import graphs
from compress.artifact import Artifact
from compress.config import Data, Prune, Quantize, Recipe, Stage, Student, Train
from compress.context import Progress
from compress.cost import TOKENS
from students.lightcap import preset


def rows(**captions):
    """Rows of `name`: milliseconds of a caption; the encoder takes half of it, a step a hundredth."""
    return [
        {"name": name.replace("_", "-"), "caption_ms": ms, "encoder_ms": ms / 2, "step_ms": ms / 100} for name, ms in captions.items()
    ]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_finds_what_it_imports(name):
    assert importlib.import_module(name).__doc__


def test_the_stages_that_benchmarks_run_get_what_the_pipeline_gives_them(monkeypatch, tmp_path):
    stage, scenes = Stage("quantize", "int8", None, Quantize()), object()  # which no context reads
    recipe = Recipe("x", 3, Data(), Student(), (stage, Stage("train", "frozen", None, Train())), tmp_path)
    monkeypatch.setattr(training.train, "run", lambda parent, config, context: seen.append(context))
    seen = [models.context(scenes, tmp_path / "a", "quantize", stage.config, Progress()),
            equality.context(tmp_path / "run", Quantized(recipe, stage, None, None, scenes, None, None, {}), tmp_path / "b", Progress())]
    training.run_stage(recipe, "frozen", scenes, tmp_path, print)
    for context, output, seed in zip(seen, ("a", "b", "frozen"), (models.SEED, 3, 3), strict=True):
        assert context.output == tmp_path / output and context.seed == seed and context.artifacts == {} and context.data is scenes
        assert context.work.name.startswith("work") or context.work.suffix == ".work"
        assert context.stage in context.recipe.stages and isinstance(context.progress, Progress)


def test_latencys_ratios_are_the_others_time_over_ours_and_ours_over_the_limits():
    found = latency.ratios(rows(eager=200.0, int8=40.0, pruned_int8=20.0, blip_base=2000.0, git_base=1000.0, ort_static=50.0), "ms")
    assert found == {
        "encoder_int8_vs_eager": 5.0, "step_int8_vs_eager": 5.0, "caption_int8_vs_eager": 5.0, "caption_pruned_int8_vs_eager": 10.0,
        "caption_int8_vs_blip_base": 50.0, "caption_int8_vs_git_base": 25.0, "encoder_int8_vs_ort_static": 0.8,
        "encoder_int8_vs_openvino": None,
    }


def test_what_is_not_measured_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = latency.left_out(["git-base"])
    assert found.keys() == {"openvino", "git-base"} and "lightcap[bench]" in found["openvino"]
    assert set(neighbours.NAMES) >= found.keys()


def test_a_row_holds_each_phase_a_step_and_the_whole_caption():
    times = [{"encoder": (10.0 + i, 9.0), "steps": (TOKENS * 2.0, TOKENS * 1.0), "text": (1.0, 1.0)} for i in range(3)]
    row = latency.summary(times)
    assert (row["encoder_ms"], row["step_ms"], row["step_cpu_ms"]) == (11.0, 2.0, 1.0)
    assert (row["caption_ms"], row["caption_cpu_ms"]) == (11.0 + 2 * TOKENS + 1, 10.0 + TOKENS)
    assert row["caption_ms_q1"] <= row["caption_ms"] <= row["caption_ms_q3"] and "steps_ms" not in row
    assert latency.summary([one | {"first": (50.0, 40.0)} for one in times]) == row | {
        "first_ms": 50.0, "first_ms_q1": 50.0, "first_ms_q3": 50.0, "first_cpu_ms": 40.0,
    }
    assert latency.summary([{"encoder": (1.0, 1.0)}] * 2).keys() == {"encoder_ms", "encoder_ms_q1", "encoder_ms_q3", "encoder_cpu_ms"}


def test_a_turns_second_picture_counts_and_its_first_is_told(monkeypatch):
    pictures, seen, now = [np.full((1, 1, 3), value, np.uint8) for value in range(2)], [], [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def work(picture):
        seen.append(int(picture[0, 0, 0]))
        now[0] += 0.05 if len(seen) % 2 else 0.01
        yield "encoder"
        yield None

    found = latency.measure([latency.Subject("one", "", work, {})], pictures, 2)["one"]
    assert seen == [0, 1, 1, 0] * 2
    assert all((times["first"][0], times["encoder"][0]) == pytest.approx((50.0, 10.0)) for times in found)


def test_both_routes_run_all_phases_and_all_rounds_in_turn(model, folder):
    order = []

    def noting(name, work):
        def noted(picture):
            order.append(name)
            yield from work(picture)

        return noted

    eager = noting("slow", lambda picture: iter(["encoder"]))
    subjects = [latency.Subject("onnx", "", noting("onnx", latency.graphs(Artifact(folder))), {}), latency.Subject("slow", "", eager, {})]
    found = latency.measure(subjects, [np.zeros((80, 80, 3), np.uint8)], 3)
    assert order == ["onnx", "onnx", "slow", "slow"] * (3 + latency.WARM)
    assert len(found["onnx"]) == len(found["slow"]) == 3
    assert list(found["onnx"][0]) == ["pixels", "encoder", "prefix", "steps", "text", "first"]
    assert all(clock > 0 for clock, _ in found["onnx"][0].values())


def test_prunes_ratio_is_the_share_of_time_saved_over_the_share_of_macs_saved():
    whole = {"share": 1.0, "round_to": 1, "precision": "int8", "gmacs_encoder": 5.0, "gmacs_caption": 6.0}
    half = {"share": 0.5, "round_to": 8, "precision": "int8", "gmacs_encoder": 2.5, "gmacs_caption": 3.0}
    whole, half = whole | {"encoder_ms": 30.0, "caption_ms": 40.0}, half | {"encoder_ms": 18.0, "caption_ms": 30.0}
    eager = whole | {"precision": "eager", "encoder_ms": 90.0, "caption_ms": 240.0}
    assert prune.ratios([eager, whole, half], "ms") == {
        "encoder_int8_at_0.5_by_8": 0.8, "encoder_int8_at_0.5_by_8_vs_eager": 5.0,
        "caption_int8_at_0.5_by_8": 0.5, "caption_int8_at_0.5_by_8_vs_eager": 8.0,
    }
    spared = half | {"gmacs_encoder": 5.0, "encoder_ms": 30.0}  # fusion alone was cut
    assert prune.ratios([eager, whole, spared], "ms")["encoder_int8_at_0.5_by_8"] is None


def test_concepts_that_are_true_fill_the_prefix():
    pieces = torch.tensor([[10, -1], [20, 21], [30, -1]])
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    wanted = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    found = torch.tensor([[20, 21, 30, 10, 5]] * 3)
    assert oracle.repeated(wanted, scores, pieces, found).tolist() == [[20, 21, 10, 20, 21], [30] * 5, [20, 21, 30, 10, 5]]


def test_the_made_up_vocabulary_spells_every_concept_and_every_word():
    words = models.tokenizer(models.COCO_PIECES)
    assert words.get_vocab_size() == models.COCO_PIECES
    for name in models.read_concepts():
        assert "[UNK]" not in words.encode(name, add_special_tokens=False).tokens
    assert models.tokenizer().get_vocab_size() == models.BERT_PIECES


def test_bytes_without_concepts_leave_out_the_extractors_graph(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "concepts.onnx").write_bytes(bytes(1000))
    row = models.row(Artifact(tmp_path))
    assert row["bytes"] - row["bytes_without_concepts"] == 1000
    assert models.row(Artifact(folder))["bytes"] == row["bytes_without_concepts"]


def test_memory_measures_the_script_alone(folder, tmp_path):
    from PIL import Image

    photo = tmp_path / "a.png"
    Image.new("RGB", (90, 60), "red").save(photo)
    python = sys.executable
    given = [
        case for case in memory.cases(python, {"export": folder}, dict.fromkeys(memory.SIZES, photo)) if case.name != "export, large"
    ]
    imports, plain, beam = memory.measure(given, 2)
    assert (imports["name"], plain["name"], beam["name"]) == ("imports alone", "export, photo", "export, beam 5")
    assert 0 < imports["cold_start_s"] and plain["folder_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert 20 < imports["peak_mb"] < plain["peak_mb"] <= plain["peak_mb_max"] < 500
    assert "cpu_s" in plain and "cold_start_from_disk_s" not in imports
    assert ("cold_start_from_disk_s" in plain) == hasattr(os, "posix_fadvise")  # elsewhere files cannot be put out of the page cache
    with pytest.raises(RuntimeError, match="no such image"):
        memory.run((python, str(folder / "caption.py"), str(tmp_path / "none.png")))


@pytest.fixture
def tiny_models(monkeypatch):
    """The benchmarks' models, each as small as it can be."""
    from transformers import BlipConfig, BlipForConditionalGeneration, GitConfig, GitForCausalLM

    def small(name, vocabulary):
        return dataclasses.replace(preset("tiny", vocabulary=vocabulary), concepts=6, alignment=(32, 16), modulator=8)

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    blip = BlipConfig(text_config=size | {"encoder_hidden_size": 32}, vision_config=size | {"image_size": 384, "patch_size": 64})
    git = GitConfig(**size, vision_config=size | {"image_size": 224, "patch_size": 32})
    monkeypatch.setattr(models, "preset", small)
    monkeypatch.setattr(models, "HALF", Prune(macs=0.5))  # most parameters are its word pieces'
    monkeypatch.setattr(neighbours, "blip_base", lambda: BlipForConditionalGeneration(blip).eval())
    monkeypatch.setattr(neighbours, "git_base", lambda: GitForCausalLM(git).eval())


def document(benchmark, capsys, monkeypatch, *arguments):
    """What the benchmark's command says in its last line."""
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *map(str, arguments)])
    benchmark.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of transformers and openvino
def test_latency_measures_every_row_and_ratio(tiny_models, capsys, monkeypatch, tmp_path):
    arguments = ("--rounds", 2, "--images", 16, "--keep", tmp_path)
    found = document(latency, capsys, monkeypatch, *arguments)
    without = set() if importlib.util.find_spec("openvino") else {"openvino"}
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [name for name in ("eager", "onnx", "int8", "pruned-int8", *neighbours.NAMES) if name not in without]
    assert found["left_out"].keys() == without
    assert {name for name, value in found["ratios"].items() if value is None} == {f"encoder_int8_vs_{name}" for name in without}
    assert found["ratios"].keys() == found["ratios_cpu"].keys() == latency.RATIOS.keys()
    assert rows["eager"]["word_pieces"] == models.BERT_PIECES and rows["int8"]["word_pieces"] == models.COCO_PIECES
    assert rows["pruned-int8"]["gmacs_caption"] <= 0.5 * rows["int8"]["gmacs_caption"] + 0.001  # both are rounded
    assert rows["pruned-int8"]["bytes"] < rows["int8"]["bytes"] < 0.35 * rows["onnx"]["bytes"]
    assert all(row["bytes_without_concepts"] < row["bytes"] for row in rows.values() if "bytes" in row)
    kept = {path: path.stat().st_mtime for path in tmp_path.iterdir()}
    again = document(latency, capsys, monkeypatch, *arguments, "--leave-out", "blip-base", "git-base")
    assert {path: path.stat().st_mtime for path in tmp_path.iterdir()} == kept
    assert again["left_out"].keys() == without | {"blip-base", "git-base"} and again["ratios"]["caption_int8_vs_git_base"] is None


@pytest.mark.slow
def test_prune_measures_each_share_in_both_precisions(tiny_models, capsys, monkeypatch, tmp_path):
    found = document(prune, capsys, monkeypatch, "--rounds", 2, "--images", 16, "--shares", 0.8, 0.6, "--round-to", 4, 8)
    cuts = ["1", *(f"{share} by {rounding}" for share in (0.8, 0.6) for rounding in (4, 8))]
    assert [row["name"] for row in found["rows"]] == ["eager", *(f"{cut} {precision}" for cut in cuts for precision in ("fp32", "int8"))]
    macs = [row["gmacs_caption"] for row in found["rows"][1::2]]
    assert all(cut <= share * macs[0] + 0.001 for share, cut in zip((0.8, 0.8, 0.6, 0.6), macs[1:], strict=True))
    assert len(found["ratios"]) == 2 * 2 * 2 * 2 * 2


@pytest.mark.slow
def test_lightcap_40m_pruned_to_half_its_macs_keeps_the_promised_bytes(tmp_path):
    """In INT8: 20 MB of files without the concept extractor, and 25 MB with it."""
    small, half = (models.row(models.build(name, tmp_path, images=8)) for name in ("small", "pruned-int8"))
    assert half["gmacs_caption"] <= 0.5 * small["gmacs_caption"] + 1e-6 and half["params"] <= 0.6 * small["params"]
    assert half["bytes"] <= 25e6 and half["bytes_without_concepts"] <= 20e6 and half["word_pieces"] == models.COCO_PIECES


@pytest.mark.slow
def test_lightcap_40m_in_int8_keeps_the_promised_bytes_memory_and_start(tmp_path):
    """Every convolution and every product of weights in integers; 34 MB of files without the concept extractor and 40 MB with it, 200 MB of
    memory, 1.5 s from the process's start (of CPU time: other work on the machine is not the captioner's), for a photo of the usual size
    and for one of 12 megapixels."""
    from PIL import Image

    built = models.build("int8-export", tmp_path, images=8)
    row = models.row(built)
    assert row["bytes"] <= 40e6 and row["bytes_without_concepts"] <= 34e6 and row["word_pieces"] == models.COCO_PIECES
    encoding, *others = (graphs.kernels(built.path / f"{name}.onnx") for name in ("encoder", "concepts", "prefix", "decoder"))
    assert encoding["QLinearConv"] >= 55 and encoding["QLinearAdd"] == 16 and not encoding["Conv"] + encoding["FusedConv"]
    # Products of activations stay in float: windows that are pooled, and attention's two in each layer, of a prefix but in the last; of a
    # step its own pieces and the prefix apart.
    assert [found["MatMulInteger"] + found["MatMulIntegerToFloat"] for found in others] == [2, 16, 19]
    assert not any(found["Gemm"] for found in others)
    assert [found["MatMul"] + found["FusedMatMul"] for found in others] == [1, 2 * 3, 4 * 4]
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    command = (sys.executable, str(built.path / "caption.py"), "--threads", "1")
    for name, size in memory.SIZES.items():
        coarse.resize(size).save(tmp_path / f"{name}.jpg", quality=92)
        found = memory.run((*command, str(tmp_path / f"{name}.jpg")))
        assert found.peak_mb < 200 and found.cpu_s < 1.5, (name, found)
    several = memory.run((*command, *[str(tmp_path / "large.jpg")] * 5))
    assert several.peak_mb < 200, several  # a photo's pixels are not kept beside the next one's
