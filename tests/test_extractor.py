"""The concept extractor and its place in the prefix: what it chooses, and that a model with concepts is one everywhere."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from students.lightcap import LightCap, preset
from students.lightcap.concepts import NONE, ConceptVocabulary, boxes_on_grid, windows
from students.lightcap.model import Alignment

PIECES = torch.tensor([[10, NONE], [11, 12], [13, NONE], [14, 15], [16, NONE]])


def with_concepts(modulator: int | None = 4, most: int = 5) -> LightCap:
    torch.manual_seed(1)
    config = dataclasses.replace(preset("tiny", vocabulary=40), concepts=most, modulator=modulator)
    model = LightCap(config)
    model.start_concepts(torch.nn.functional.normalize(torch.randn(5, 8), dim=1), PIECES, torch.linspace(-1, 1, 5), 16, most)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and not name.startswith("encoder."):
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def grid() -> torch.Tensor:
    return torch.randn(3, 25, 128, generator=torch.Generator().manual_seed(2))


def test_windows_are_means_of_squares():
    weights = windows(5)
    assert weights.shape == (25 + 9 + 1, 25)  # 1 x 1, 3 x 3, the whole
    picture = torch.arange(25.0).view(5, 5)
    pooled = weights @ picture.flatten()
    assert pooled[:25].tolist() == list(range(25))
    assert pooled[25 + 4].item() == pytest.approx(picture[1:4, 1:4].mean().item())
    assert pooled[-1].item() == pytest.approx(12.0)
    assert windows(2).shape == (4 + 1, 4)


def test_boxes_are_pooled_as_roi_align_does():
    from torchvision.ops import roi_align

    picture = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(3))
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.1, 0.6, 0.9], [0.7, 0.7, 0.75, 0.8]])
    weights = boxes_on_grid(boxes, 7)
    wanted = roi_align(picture, [boxes * 7], output_size=1, sampling_ratio=4, aligned=True).flatten(1)
    torch.testing.assert_close(weights @ picture.flatten(2)[0].t(), wanted)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_pooling_commutes_with_the_first_layer(grid):
    alignment, weights = Alignment(128, 16, 8), windows(5)
    with torch.no_grad():
        pooled_first = alignment.second(torch.relu(alignment.first(weights @ grid)))
        torch.testing.assert_close(alignment(grid, weights), pooled_first, atol=1e-5, rtol=1e-4)


def test_scores_by_hand(grid):
    """log of the mean over windows of exp(match), on top of the prior."""
    model = with_concepts()
    with torch.no_grad():
        found = model.concept_scores(grid)
        aligned = model.alignment(grid, model.windows).double()
        wanted = (aligned @ model.concepts.matrix.double().t()).exp().mean(1).log() + model.concepts.prior
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("order", "most", "wanted"),
    [([1, 0, 2, 3, 4], 5, [11, 12, 10, 13, 14]), ([0, 2, 4, 1, 3], 3, [10, 13, 16]), ([3, 1, 0, 2, 4], 7, [14, 15, 11, 12, 10, 13, 16])],
)
def test_best_concepts_first_cut_at_the_limit(order, most, wanted):
    vocabulary = ConceptVocabulary(5, 8, 2)
    vocabulary.pieces = PIECES
    scores = torch.empty(5)
    scores[order] = torch.arange(5.0, 0.0, -1.0)
    assert vocabulary.choose(scores[None], most).tolist() == [wanted]


def test_concepts_change_what_is_said(grid):
    model, token = with_concepts(), torch.full((3, 1), 2)
    with torch.no_grad():
        found = model.find_concepts(grid)
        plain = model.step(token, 0, model.prefill(grid))[0]
        same = model.step(token, 0, model.prefill(grid, found))[0]
        other = model.step(token, 0, model.prefill(grid, found.flip(1).roll(1, 0)))[0]
        past = model.prefill(grid)
    assert torch.equal(plain, same) and (plain - other).abs().max() > 1e-2
    assert past[0][0].shape == (3, 2, model.config.prefix, 16) and model.config.prefix == 30


def test_the_modulator_sees_concepts(grid):
    model, token = with_concepts(), torch.full((3, 1), 2)
    with torch.no_grad():
        before = model.step(token, 0, model.prefill(grid))[0]
        model.modulator.up.bias += torch.randn(128)
        assert (model.step(token, 0, model.prefill(grid))[0] - before).abs().max() > 1e-3


def test_concepts_survive_a_smaller_vocabulary(grid):
    """Narrowed, the model finds the same words under their new ids, and says the same."""
    model, token = with_concepts(), torch.full((3, 1), 2)
    keep = torch.tensor([2, 3, *range(10, 17), 30])
    with torch.no_grad():
        before, found = model.step(token, 0, model.prefill(grid))[0], model.find_concepts(grid)
        full = model.word.detach().clone()
        model.narrow(keep)
        assert torch.equal(keep[model.find_concepts(grid)], found)
        torch.testing.assert_close(model.step(torch.zeros_like(token), 0, model.prefill(grid))[0], before[:, keep])
        model.widen(keep, full, -100.0)
        assert torch.equal(model.find_concepts(grid), found) and torch.equal(model.concepts.pieces, PIECES)
    with pytest.raises(ValueError, match="do not spell every concept"):
        model.narrow(torch.tensor([2, 3, 10, 11]))


def test_a_model_whose_concepts_were_never_trained(grid):
    model = LightCap(dataclasses.replace(preset("tiny", vocabulary=40), concepts=5, alignment=(16, 8)))
    with pytest.raises(ValueError, match="never trained"):
        model.prefill(grid)


def test_saved_with_all_it_knows(tmp_path, grid):
    model = with_concepts()
    model.save_pretrained(tmp_path)
    loaded = LightCap.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.own_pieces() == list(range(10, 17))
    assert torch.equal(loaded.find_concepts(grid), model.find_concepts(grid))


def exported(model: LightCap, folder) -> None:
    import json

    from compress.stages.export import export
    from compress.training.start import write_captioner
    from students.lightcap.encoder import preprocessor
    from students.lightcap.tokenizer import SPECIAL, word_pieces

    (folder / "float").mkdir()
    tokenizer = word_pieces([*SPECIAL, *(f"w{i}" for i in range(5, 40))])
    write_captioner(folder / "float", model, tokenizer, preprocessor("resnet-small", 80))
    assert json.loads((folder / "float" / "config.json").read_text())["concepts"] == 5
    export(dataclasses.make_dataclass("Made", ["path", "quantized"])(folder / "float", False), folder / "out")


@pytest.mark.parametrize("modulator", [4, None])
def test_the_exported_captioner_is_the_model(tmp_path, modulator):
    """ONNX Runtime's concepts, first logits and a cached step against PyTorch's."""
    from compress import runtime

    model = with_concepts(modulator)
    exported(model, tmp_path)
    captioner = runtime.Captioner(tmp_path / "out", threads=1)
    found = {name: tensor for name in ("prefix.onnx", "decoder.onnx")
             for tensor in onnx.load(tmp_path / "out" / name, load_external_data=False).graph.initializer
             if tuple(tensor.dims) == (model.config.hidden, model.config.vocabulary)}
    assert len({ExternalDataInfo(tensor).offset for tensor in found.values()}) == 1 and len(found) == 2  # the embedding is stored once
    pixels = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        grid = model.encode(pixels)
        past = model.prefill(grid)
        first, past = model.step(torch.full((2, 1), 2), 0, past)
        second, _ = model.step(torch.tensor([[7], [8]]), 1, past)
    found = captioner.encode(pixels.numpy())
    assert captioner.extractor.run(None, {"grid": found})[0].tolist() == model.find_concepts(grid).tolist()
    cache = captioner.prefill(found)
    mine, cache = captioner.step([2, 2], 0, cache)
    np.testing.assert_allclose(mine, first.numpy(), atol=1e-4)
    np.testing.assert_allclose(captioner.step([7, 8], 1, cache)[0], second.numpy(), atol=1e-4)
    (tmp_path / "out" / "concepts.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"no concepts\.onnx there"):
        runtime.Captioner(tmp_path / "out")
