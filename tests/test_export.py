import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_captioner as tiny
import torch
from PIL import Image

from compress import graphs, runtime
from compress.errors import ModelError
from compress.stages import export

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


def test_prefix_and_steps_of_one_graph_give_pytorchs_keys_and_logits_with_a_pruned_layer(model, captioner):
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


def test_a_model_of_one_layer_and_one_head_and_another_image_size_exports_too(tmp_path):
    torch.manual_seed(1)
    sizes = {"vocabulary": tiny.tokenizer().get_vocab_size(), "image_size": 48, "layers": 1, "heads": 1}
    model = tiny.LightCap(tiny.preset("tiny", **sizes)).eval()
    graph = export.decoder_graph(model)
    assert {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}["prefix_places"] == [9, 32]
    graphs.write(graphs.clean(graph), tmp_path / "decoder.onnx")
    session = runtime.open_session(tmp_path / "decoder.onnx", 1)
    grid, none = np.random.default_rng(0).normal(size=(1, 9, 128)).astype(np.float32), np.zeros((1, 0), np.int64)
    past = {item.name: np.zeros((1, 2, 0, 16), np.float32) for item in session.get_inputs()[3:]}
    assert list(past) == ["prefix_key_0", "prefix_value_0", "past_key_0", "past_value_0"]
    _, *seen = session.run(None, {"grid": grid, "tokens": none, "positions": none, **past})
    token, past = np.array([[7]]), past | dict(zip(past, seen, strict=False))
    logits = session.run(None, {"grid": grid[:, :0], "tokens": token, "positions": np.zeros_like(token), **past})[0][:, -1]
    with torch.no_grad():
        prefix = model.prefill(torch.from_numpy(grid))
        np.testing.assert_allclose(seen[0], prefix[0].keys.numpy(), atol=1e-4)
        np.testing.assert_allclose(logits, model.step(torch.from_numpy(token), 0, prefix)[0].numpy(), atol=1e-4)


@pytest.mark.parametrize(("text", "products"), [(16, 1), (8, 2)])
def test_concepts_are_matched_in_as_few_weights_as_can_be(text, products):
    """Behind the ReLU 32 x 24 weights, or 32 x text + text x 24: the same scores as the model's."""
    model = tiny.build()
    model.start_concepts(torch.randn(24, text), torch.arange(10, 34).unsqueeze(1), torch.randn(24), 32, 6)
    grid = torch.randn(2, 25, 128)
    scores = export.ConceptScores(model)
    with torch.no_grad():
        torch.testing.assert_close(scores(grid), model.concept_scores(grid), atol=1e-5, rtol=1e-5)
    assert len(scores.matching) == products
    kinds = [node.op_type for node in export.concepts_graph(model).graph.node]
    assert kinds.count("MatMul") == 2 + products  # the windows' is one


def test_no_weight_is_stored_twice(model, folder):
    vocabulary = model.config.vocabulary
    decoder = onnx.load(folder / "decoder.onnx").graph
    words = [tensor for tensor in decoder.initializer if vocabulary in tensor.dims and len(tensor.dims) == 2]
    assert [list(tensor.dims) for tensor in words] == [[32, vocabulary]]
    readers = [node.op_type for node in decoder.node if words[0].name in node.input]
    assert sorted(readers) == ["Gather", "MatMul"]
    parameters = 4 * sum(p.numel() for part in (model.encoder, model.fusion, model.heads) for p in part.parameters())
    assert 0 < graphs.weight_bytes(folder)["float"] <= parameters
    assert graphs.weight_bytes(folder)["integer"] == 0


def test_two_exports_are_equal_bytes_and_hold_no_path_of_this_machine(model, folder, tmp_path):
    graphs.write(graphs.clean(export.decoder_graph(model)), tmp_path / "decoder.onnx")
    graphs.write(graphs.clean(export.encoder_graph(model)), tmp_path / "encoder.onnx")
    for name in ("encoder.onnx", "decoder.onnx"):
        contents = (folder / name).read_bytes()
        assert (tmp_path / name).read_bytes() == contents
        for trace in (str(Path.home()), str(Path(export.__file__).parents[2]), "site-packages", ".py", "students", "fusion."):
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
        with pytest.raises(ModelError, match=r"neither model.safetensors nor encoder.onnx"):
            export.export(tiny.Artifact(folder), tmp_path / "half")
    finally:
        (folder / "hidden").rename(folder / "encoder.onnx")
