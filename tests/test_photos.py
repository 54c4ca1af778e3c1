"""Photos that can be read and those that cannot, and what a fingerprint depends on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from caption_files import NAMES, fails, picture
from PIL import Image

from compress import runtime
from compress.config import Data
from compress.data import UnreadableImage, load, photos


def break_images(data):
    folder = Path(data.captions).parent / "images"
    (folder / "a.jpg").unlink()
    (folder / "c.jpg").write_bytes(b"not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "d.jpg")
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:2000])


def test_unreadable_images_are_named_counted_and_left_out(karpathy):
    data = karpathy(max_unreadable=0.5)
    whole = load(data)
    break_images(data)
    found = load(data)
    assert found.unreadable == ("a.jpg", "c.jpg", "d.jpg")
    assert [example.image_id for example in found.examples] == ["b.avif", "e.jpg", "f.avif"]
    assert found.fingerprint != whole.fingerprint
    for number, message in ((0, "image a.jpg is missing"), (2, "image c.jpg is no image file that Pillow reads")):
        with pytest.raises(UnreadableImage) as error:
            whole.image(whole.examples[number])
        assert str(error.value) == message and error.value.exit_code == 2


def test_too_many_unreadable_images_are_refused(karpathy):
    break_images(karpathy())
    message = fails(karpathy(max_unreadable=0.4))
    assert message.startswith(
        "dataset.json: 3 of 6 images (50.0%) cannot be read, and 40.0% are allowed: image a.jpg is missing; "
        "image c.jpg is no image file that Pillow reads; image d.jpg cannot be decoded: "
    )
    assert message.endswith("--set data.images=PATH, or leave them out with --set data.max_unreadable=0.501")
    assert len(load(karpathy(max_unreadable=0.501))) == 3
    for name in NAMES:
        (Path(karpathy().captions).parent / "images" / name).write_bytes(b"")
    assert "not one of 6 images can be read" in fails(karpathy(max_unreadable=1.0))


def test_the_outcome_is_kept_and_never_stale(karpathy, tmp_path, monkeypatch):
    data = karpathy(max_unreadable=0.5)
    break_images(data)
    cache = tmp_path / "cache"
    first = load(data, cache)
    (record,) = cache.iterdir()
    assert json.loads(record.read_text())["unreadable"].keys() == {"a.jpg", "c.jpg", "d.jpg"}

    decoded = []
    decode = photos.decode
    monkeypatch.setattr(photos, "decode", lambda content, name: decoded.append(name) or decode(content, name))
    assert load(data, cache) == first and sorted(decoded) == ["a.jpg", "c.jpg", "d.jpg"]  # they alone are tried again
    record.write_text("{half")
    decoded.clear()
    assert load(data, cache) == first and sorted(decoded) == NAMES
    decoded.clear()
    with monkeypatch.context() as other:  # another Pillow may read more
        other.setattr(photos, "made_by", lambda module: "f" * 64)
        assert load(data, cache) == first and sorted(decoded) == NAMES
    picture(Path(data.captions).parent / "images", "a.jpg")
    assert load(data, cache).unreadable == ("c.jpg", "d.jpg")


def test_images_that_are_back_are_no_longer_left_out(karpathy, tmp_path, monkeypatch):
    """A disk that was away for a moment, after the images' contents were compared."""
    data, cache = karpathy(max_unreadable=0.5), tmp_path / "cache"
    whole = load(data)
    decode = photos.decode

    def away(content, name):
        if name in missing:
            raise photos.UnreadableImage(f"image {name} is missing")
        return decode(content, name)

    monkeypatch.setattr(photos, "decode", away)
    missing = NAMES
    assert "6 of 6 images (100.0%) cannot be read" in fails(data, cache)
    missing = NAMES[:2]
    some = load(data, cache)
    assert some.unreadable == tuple(NAMES[:2]) and some.fingerprint != whole.fingerprint
    missing = []
    assert load(data, cache) == whole


def test_photos_are_turned_upright_and_made_rgb(karpathy):
    data = karpathy()
    folder = Path(data.captions).parent / "images"
    turned = Image.new("L", (24, 16), 80)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "a.jpg", exif=exif)
    found = load(data)
    assert found.image(found.examples[0]).shape == (24, 16, 3)


def test_pictures_pillow_warns_of_are_read(karpathy):
    data = karpathy()
    pale = Image.new("P", (24, 16), 1)
    pale.info["transparency"] = b"\x00\x80"
    pale.putpalette([0, 0, 0, 250, 10, 10])
    pale.save(Path(data.captions).parent / "images" / "a.jpg", format="PNG", transparency=b"\x00\x80")
    assert load(data).unreadable == ()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I"])
def test_training_sees_a_picture_as_the_device_does(tmp_path, mode):
    noise = np.random.default_rng(3).integers(0, 255, (16, 24, 4), dtype=np.uint8)
    wide = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    image = wide.convert(mode) if mode.startswith("I") else Image.fromarray(noise).convert(mode)
    file = tmp_path / ("a.tiff" if mode in ("CMYK", "I") else "a.png")
    image.save(file)
    np.testing.assert_array_equal(photos.decode(file, "a"), runtime.open_photo(file))


# ---- fingerprints


def test_fingerprint_depends_on_contents_alone(karpathy, tmp_path):
    first = load(karpathy()).fingerprint
    assert load(karpathy()).fingerprint == first
    moved = tmp_path / "far" / "away"
    shutil.copytree(tmp_path / "set", moved, copy_function=shutil.copyfile)  # new times too
    (moved / "images").rename(moved / "pictures")
    elsewhere = Data(source="karpathy", captions=str(moved / "dataset.json"), images=str(moved / "pictures"))
    assert load(elsewhere).fingerprint == first


def test_fingerprint_changes_with_a_pixel_a_caption_a_split_a_name(karpathy):
    marks = [load(karpathy()).fingerprint]
    folder = Path(karpathy().captions).parent / "images"
    image = Image.open(folder / "c.jpg").convert("RGB")
    image.putpixel((3, 3), (0, 0, 0))
    image.save(folder / "c.jpg", quality=95)
    marks.append(load(karpathy()).fingerprint)
    marks.append(load(karpathy(lambda images: images[0]["sentences"][0].update(raw="A a sat here ."))).fingerprint)
    marks.append(load(karpathy(lambda images: images[4].update(split="test"))).fingerprint)
    (folder / "e.jpg").rename(folder / "g.jpg")
    marks.append(load(karpathy(lambda images: images[4].update(filename="g.jpg"))).fingerprint)
    marks.append(load(karpathy(train_images=1)).fingerprint)
    assert len(set(marks)) == 6


def test_large_sets_are_hashed_by_size_and_ends(karpathy, monkeypatch):
    data = karpathy(max_unreadable=0.5)
    path = Path(data.captions).parent / "images" / "a.jpg"
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(photos, "WHOLE", 100)
    monkeypatch.setattr(photos, "ENDS", 10)
    marks = [load(data).fingerprint]
    for content in (b"x" * 500 + b"y" + b"x" * 499, b"y" + b"x" * 999, b"x" * 999 + b"y", b"x" * 1001):
        path.write_bytes(content)
        marks.append(load(data).fingerprint)
    assert marks[0] == marks[1] and len(set(marks[1:])) == 4
