"""What the encoder sees and gives, in training as on the device."""

import types

import numpy as np
import torch

from compress.context import Progress
from compress.training import features, loop
from compress.training.corpus import disturbed
from students.lightcap import LightCap, preset

QUIET = Progress(quiet=True)


class Pictures:
    fingerprint = "f" * 64

    def __init__(self, count: int = 5, size: int = 80) -> None:
        self.examples = [types.SimpleNamespace(image_id=f"p{i}") for i in range(count)]
        self.size, self.read = size, []

    def __len__(self):
        return len(self.examples)

    def image(self, example):
        self.read.append(example.image_id)
        number = int(example.image_id[1:])
        return np.random.default_rng(number).integers(0, 256, (self.size, self.size + number, 3), dtype=np.uint8)


def test_features_are_the_encoder_s_and_computed_once(tmp_path, monkeypatch):
    from compress import runtime
    from students.lightcap.encoder import preprocessor

    torch.manual_seed(0)
    model, settings, data = LightCap(preset("tiny", vocabulary=9)).eval(), preprocessor("resnet-small", 80), Pictures()
    grids = features.grids(model, data, settings, tmp_path, QUIET)
    assert grids.shape == (5, 25, 128) and grids.dtype == np.float16 and sorted(data.read) == [f"p{i}" for i in range(5)]
    batch = np.stack([runtime.pixels(data.image(example), settings) for example in data.examples])
    with torch.no_grad():
        wanted = model.encode(torch.from_numpy(batch)).numpy()
    for picture in map(data.image, data.examples):  # the device's own preprocessing
        assert np.array_equal(features.squash(picture, settings), runtime.squash(picture, settings))
        seen = features.normalised(features.squash(picture, settings)[None], settings, torch.device("cpu"))[0]
        np.testing.assert_allclose(seen, runtime.pixels(picture, settings), atol=1e-5)
    np.testing.assert_allclose(grids, wanted, atol=1e-4, rtol=1e-3)  # half precision
    data.read.clear()
    assert np.array_equal(features.grids(model, data, settings, tmp_path, QUIET), grids) and data.read == []
    with torch.no_grad():
        model.encoder.blocks[0].bn1.running_mean += 0.5  # a buffer counts, too
    changed = features.grids(model, data, settings, tmp_path, QUIET)
    assert not np.array_equal(changed, grids)
    assert data.read == []  # the pictures were decoded already
    monkeypatch.setattr(features, "made_by", lambda module: "other code")
    assert np.array_equal(features.grids(model, data, settings, tmp_path, QUIET), changed) and len(data.read) == len(data.examples)
    other = Pictures()  # of the same names, as generated scenes of another seed are
    other.fingerprint = "e" * 64
    features.grids(model, other, settings, tmp_path, QUIET)
    assert len(other.read) == len(other.examples)


def test_pictures_are_disturbed_alike_in_every_precision():
    """In bf16 the places that a picture is read at would be off by up to half a pixel."""
    pictures, found = torch.rand(4, 3, 224, 224), []
    for chosen in ("fp32", "bf16"):
        torch.manual_seed(0)
        with loop.autocast(chosen, torch.device("cpu")):
            found.append(disturbed(pictures, True, 0.2))
    assert found[0].shape == pictures.shape and not torch.equal(found[0], pictures) and torch.equal(*found)
