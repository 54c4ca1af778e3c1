import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_captioner as tiny
import torch
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo
from PIL import Image

from compress import graphs, runtime
from compress.errors import ModelError
from compress.stages import export
from compress.stages.export import modules, writer

# Runs a script as a machine without these packages would.
ALONE = (
    "import runpy, sys; blocked = ('torch', 'transformers', 'onnx', 'compress', 'students', 'safetensors', 'neural_compressor'); "
    "sys.modules.update(dict.fromkeys(blocked)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_the_encoder_gives_pytorchs_grid_for_any_number_of_images(model, captioner):
    for count in (1, 3):
        pixels = tiny.pixels(tiny.pictures(count))
        with torch.no_grad():
            expected = model.encode(torch.from_numpy(pixels)).numpy()
        np.testing.assert_allclose(captioner.encode(pixels), expected, atol=1e-4)


def test_prefix_and_steps_give_pytorchs_keys_and_logits_with_a_pruned_layer(model, captioner):
    grid = torch.randn(3, 25, 128)
    with torch.no_grad():
        past = model.prefill(grid)
        mine = captioner.prefill(grid.numpy())
        for expected, got in zip([tensor for seen in past for tensor in (seen.keys, seen.values)], mine.prefix, strict=True):
            np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
        assert mine.prefix[0].shape == (3, 1, 25, 16) and mine.prefix[2].shape == (3, 2, 25, 16)
        for position in range(6):
            tokens = torch.randint(5, 100, (3,))
            logits, past = model.step(tokens[:, None], position, past)
            got, mine = captioner.step(tokens.numpy(), position, mine)
            assert logits.std() > 0.1
            np.testing.assert_allclose(got, logits.numpy(), atol=1e-4)


@pytest.mark.parametrize(("sizes", "shapes", "mask"), [
    ({"image_size": 48, "layers": 1, "heads": 1}, {}, None),
    ({"layers": 3, "heads": 3}, {name.replace("layers.0", "layers.2"): shape for name, shape in tiny.PRUNED.items()}, None),
    ({"layers": 2, "hidden": 24, "attention_heads": 3}, {}, 4),
    ({"layers": 2, "modulator": 8, "heads": 3}, {}, None),
], ids=["one layer and one head", "a pruned last layer", "masked pieces", "a modulator that has nothing to read"])
def test_any_decoder_gives_pytorchs_keys_and_logits(sizes, shapes, mask, tmp_path):
    torch.manual_seed(1)
    config = tiny.preset("tiny", vocabulary=tiny.tokenizer().get_vocab_size(), **sizes)
    model = tiny.LightCap(dataclasses.replace(config, shapes=shapes, mask_piece=mask)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prefix = export.prefix_graph(model)
    sizes_of = {tensor.name: list(tensor.dims) for tensor in prefix.graph.initializer}
    assert sizes_of["prefix_places"] == [model.config.prefix, model.config.hidden]
    export.write_decoder(prefix, export.step_graph(model), tmp_path)
    prefix, step = (runtime.open_session(tmp_path / name, runtime.session_options(1)) for name in ("prefix.onnx", "decoder.onnx"))
    names = [item.name for item in step.get_inputs()]
    assert names == ["tokens", "positions", *(f"{kind}_{part}_{layer}" for kind in ("prefix", "past")
                                              for layer in range(model.config.layers) for part in ("key", "value"))]
    grid = torch.randn(3, model.config.grid**2, 128)
    seen = prefix.run(None, {"grid": grid.numpy()})
    own = [np.zeros((3, value.shape[1], 0, value.shape[3]), np.float32) for value in seen]
    with torch.no_grad():
        past = model.prefill(grid)
        for mine, wanted in zip(seen, [tensor for layer in past for tensor in (layer.keys, layer.values)], strict=True):
            np.testing.assert_allclose(mine, wanted.numpy(), atol=1e-5)
        for position in range(4):
            tokens = torch.randint(5, 100, (3, 1))
            wanted, past = model.step(tokens, position, past)
            read, places = (tokens, [position]) if mask is None else (torch.cat([tokens, torch.full_like(tokens, mask)], 1),
                                                                     [position, position + 1])
            fed = [read.numpy(), np.tile(places, (3, 1)), *seen, *own]
            logits, *own = step.run(None, dict(zip(names, fed, strict=True)))
            own = [value[:, :, : position + 1] for value in own]  # nothing is kept of [MASK]
            np.testing.assert_allclose(logits[:, 0], wanted.numpy(), atol=1e-5)
            assert wanted.std() > 0.1


@pytest.mark.parametrize(("text", "products"), [(16, 1), (8, 2)])
def test_concepts_are_matched_in_as_few_weights_as_can_be(text, products):
    """Behind the ReLU 32 x 24 weights, or 32 x text + text x 24: the same scores as the model's."""
    model = tiny.build()
    model.start_concepts(torch.randn(24, text), torch.arange(10, 34).unsqueeze(1), torch.randn(24), 32, 6)
    grid = torch.randn(2, 25, 128)
    scores = modules.ConceptScores(model)
    with torch.no_grad():
        torch.testing.assert_close(scores(grid), model.concept_scores(grid), atol=1e-5, rtol=1e-5)
    assert len(scores.matching) == products
    kinds = [node.op_type for node in export.concepts_graph(model).graph.node]
    assert kinds.count("MatMul") == 2 + products  # the windows' is one


def test_no_weight_is_stored_twice(model, folder):
    vocabulary = model.config.vocabulary
    prefix, step = (onnx.load(folder / name, load_external_data=False).graph for name in ("prefix.onnx", "decoder.onnx"))
    [words] = [tensor for tensor in step.initializer if vocabulary in tensor.dims and len(tensor.dims) == 2]
    assert list(words.dims) == [32, vocabulary]
    assert sorted(node.op_type for node in step.node if words.name in node.input) == ["Gather", "MatMul"]
    places = [{ExternalDataInfo(tensor).offset for tensor in graph.initializer if tensor.external_data} for graph in (prefix, step)]
    assert len(places[0] & places[1]) == 6  # four products of the first layer, keys and values of the last, and one bias of 256 bytes
    parameters = 4 * sum(p.numel() for part in (model.encoder, model.fusion, model.heads) for p in part.parameters())
    assert 0 < graphs.weight_bytes(folder)["float"] <= parameters
    assert graphs.weight_bytes(folder)["integer"] == 0
    assert sum((folder / name).stat().st_size for name in ("prefix.onnx", "decoder.onnx")) < (folder / "decoder.onnx.data").stat().st_size


def test_what_graphs_share_is_written_once_and_reads_back(tmp_path):
    """Equal contents in several graphs, of any name and shape, large enough to be worth a place; the small ones stay where they are."""
    rng = np.random.default_rng(0)
    large, other, small = rng.normal(size=(16, 16)), rng.normal(size=(17, 19)), rng.normal(size=(4,))
    given = {"a.onnx": {"x": large, "y": small}, "b.onnx": {"p": other, "q": large.reshape(4, 64)}}
    protos = {}
    for name, tensors in given.items():
        nodes = [helper.make_node("Identity", [key], [f"{key}_out"]) for key in tensors]
        outputs = [helper.make_tensor_value_info(f"{key}_out", onnx.TensorProto.DOUBLE, value.shape) for key, value in tensors.items()]
        weights = [numpy_helper.from_array(value, key) for key, value in tensors.items()]
        graph = helper.make_graph(nodes, "graph", [], outputs, weights)
        protos[name] = helper.make_model(graph, opset_imports=[helper.make_opsetid("", writer.OPSET)], ir_version=10)
    graphs.write_sharing(protos, tmp_path, "ab.data")
    assert (tmp_path / "ab.data").stat().st_size == large.nbytes + other.nbytes
    assert sum(graphs.size_of(tensor) for _, tensor in graphs.named_weights(tmp_path)) == large.nbytes + other.nbytes + small.nbytes
    for name, tensors in given.items():
        got = runtime.open_session(tmp_path / name, runtime.session_options(1)).run(None, {})
        for value, expected in zip(got, tensors.values(), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_two_exports_are_equal_bytes_and_hold_no_path_of_this_machine(model, folder, tmp_path):
    export.write_decoder(export.prefix_graph(model), export.step_graph(model), tmp_path)
    graphs.write(graphs.clean(export.encoder_graph(model)), tmp_path / "encoder.onnx")
    assert (tmp_path / "decoder.onnx.data").read_bytes() == (folder / "decoder.onnx.data").read_bytes()
    for name in ("encoder.onnx", "prefix.onnx", "decoder.onnx"):
        contents = (folder / name).read_bytes()
        assert (tmp_path / name).read_bytes() == contents
        for trace in (str(Path.home()), str(Path(export.__file__).parents[3]), "site-packages", ".py", "students", "fusion."):
            assert trace.encode() not in contents
        graph = onnx.load(folder / name)
        assert not graph.doc_string and not graph.metadata_props and not any(node.metadata_props for node in graph.graph.node)


def test_the_folder_captions_by_itself_without_torch(folder, captioner, tmp_path):
    photos = []
    for index, picture in enumerate(tiny.pictures(2)):
        photos.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(picture).save(photos[-1])
    command = [sys.executable, "-I", "-c", ALONE, str(folder / "caption.py"), "--beam", "3", "--json", *photos]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = json.loads(done.stdout)
    expected = [captioner.caption(photo, beam=3) for photo in photos]
    assert [(row["image"], row["caption"]) for row in rows] == [(p, c) for p, (c, _) in zip(photos, expected, strict=True)]
    np.testing.assert_allclose([row["logprob"] for row in rows], [logprob for _, logprob in expected], atol=1e-4)


def test_requirements_name_what_the_script_imports(folder):
    names = {line.split(">=")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert names == {"numpy", "pillow", "tokenizers", "onnxruntime"}
    assert (folder / "caption.py").read_bytes() == Path(runtime.__file__).read_bytes()


def test_graphs_are_copied_from_an_artifact_that_has_no_float_weights(folder, tmp_path):
    export.export(tiny.Artifact(folder), tmp_path / "again")
    for name in runtime.FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    (folder / "encoder.onnx").rename(folder / "hidden")
    try:
        with pytest.raises(ModelError, match=r"has neither model.safetensors nor encoder.onnx"):
            export.export(tiny.Artifact(folder), tmp_path / "half")
    finally:
        (folder / "hidden").rename(folder / "encoder.onnx")
