"""Readers on small files of each layout, their errors, and what a fingerprint depends on."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress import runtime
from compress.config import Data
from compress.data import SOURCES, UnreadableImage, load, photos
from compress.data.captions import clean, hashed_split
from compress.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["a.jpg", "b.avif", "c.jpg", "d.jpg", "e.jpg", "f.avif"]
KARPATHY_SPLITS = ["train", "restval", "val", "test", "train", "val"]
SPLITS = ["train", "train", "val", "test", "train", "val"]


def captions_of(name):
    return [f"A {name[0]} sits here .", f"there is  a {name[0]}"]


def picture(folder, name, colour=(200, 30, 40), size=(24, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name, quality=95)


@pytest.fixture
def karpathy(tmp_path):
    """Six images in Karpathy's layout; returns a function that gives `Data`, after `change` has edited the JSON."""
    folder = tmp_path / "set"
    for number, name in enumerate(NAMES):
        picture(folder / "images", name, (40 * number, 90, 200))
    images = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": text, "tokens": text.split()} for text in captions_of(name)],
        }
        for name, split in zip(NAMES, KARPATHY_SPLITS, strict=True)
    ]
    found = {"dataset": "small", "images": images}

    def write(change=None, **settings):
        if change:
            change(found["images"])
        (folder / "dataset.json").write_text(json.dumps(found))
        return Data(**{"source": "karpathy", "captions": str(folder / "dataset.json"), **settings})

    return write


def fails(data, cache=None):
    with pytest.raises(DataError) as error:
        load(data, cache)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    return str(error.value)


# Readers.


def test_karpathy(karpathy):
    found = load(karpathy())
    assert [example.image_id for example in found.examples] == NAMES
    assert [example.split for example in found.examples] == SPLITS
    assert found.examples[1].captions == ("A b sits here .", "there is a b")
    assert found.splits() == {"train": 3, "val": 2, "test": 1}
    assert (found.name, found.unreadable, len(found.fingerprint)) == ("dataset.json", (), 64)
    for number in (0, 1, 2):
        image = found.image(found.examples[number])
        assert image.shape == (16, 24, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - (40 * number, 90, 200)).max() < 12


def test_karpathy_joins_tokens_and_finds_coco_folders(karpathy):
    def change(images):
        images[0]["filepath"] = "val2014"
        images[0]["sentences"] = [{"tokens": ["two", "cats"]}]

    data = karpathy(change)
    folder = Path(data.captions).parent / "images"
    picture(folder / "val2014", "a.jpg", (1, 200, 3))
    found = load(data)
    assert found.examples[0].captions == ("two cats",)
    assert found.image(found.examples[0])[0, 0, 1] > 180


def write_coco(path, names, first=10):
    images = [{"id": first + number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"image_id": image["id"], "caption": text} for image in images for text in captions_of(image["file_name"])]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes[::-1]}))


def test_coco_splits_by_file_name(tmp_path):
    for name in NAMES[:3]:
        picture(tmp_path / "images", name)
    picture(tmp_path / "images" / "val2017", NAMES[3])
    write_coco(tmp_path / "captions_train2017.json", NAMES[:3])
    write_coco(tmp_path / "captions_val2017.json", NAMES[3:4])
    write_coco(tmp_path / "captionsVal2017.json", NAMES[3:4])
    both = f"{tmp_path}/captions_train2017.json, {tmp_path}/captionsVal2017.json"
    assert load(Data(source="coco", captions=both, images=str(tmp_path / "images"))).splits() == {"train": 3, "val": 1}
    both = f"{tmp_path}/captions_train2017.json, {tmp_path}/captions_val2017.json"
    found = load(Data(source="coco", captions=both, images=str(tmp_path / "images")))
    assert [(e.image_id, e.split) for e in found.examples] == list(zip(NAMES[:4], ["train"] * 3 + ["val"], strict=True))
    assert sorted(found.examples[0].captions) == ["A a sits here .", "there is a a"]
    assert found.name == "captions_train2017.json,captions_val2017.json"
    write_coco(tmp_path / "more.json", NAMES[4:])
    message = fails(Data(source="coco", captions=f"{both},{tmp_path}/more.json", images=str(tmp_path / "images")))
    assert message.endswith("more.json says neither train, val nor test; of several files each must")


def test_one_coco_file_is_split_by_a_hash_of_ids(tmp_path):
    names = [f"{number}.png" for number in range(120)]
    for name in names:
        picture(tmp_path / "images", name, size=(4, 4))
    for name in ("captions.json", "latest_retrieval_evaluation.json"):  # neither is a split's
        write_coco(tmp_path / name, names, first=0)
        found = load(Data(source="coco", captions=str(tmp_path / name)))
        assert [example.split for example in found.examples] == [hashed_split(str(number)) for number in range(120)]
        assert found.splits() == {"train": 99, "val": 10, "test": 11}


def test_hashed_split_is_80_10_10():
    splits = [hashed_split(str(number)) for number in range(20_000)]
    shares = [splits.count(split) / len(splits) for split in ("train", "val", "test")]
    assert np.abs(np.array(shares) - (0.8, 0.1, 0.1)).max() < 0.01


def write_flickr8k(folder):
    lines = [f"{name}#{k}\t{text}" for name in NAMES for k, text in enumerate(captions_of(name))]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        listed = [image for image, its in zip(NAMES, SPLITS, strict=True) if its == split]
        (folder / f"Flickr_8k.{name}Images.txt").write_text("\n".join(listed) + "\n")


def test_flickr8k(tmp_path):
    for name in NAMES:
        picture(tmp_path / "Flicker8k_Dataset", name)
    write_flickr8k(tmp_path)
    found = load(Data(source="flickr8k", captions=str(tmp_path / "Flickr8k.token.txt")))
    assert {example.image_id: example.split for example in found.examples} == dict(zip(NAMES, SPLITS, strict=True))
    assert found.examples[0].captions == ("A a sits here .", "there is a a")
    assert load(Data(source="flickr8k", captions=str(tmp_path))).fingerprint == found.fingerprint
    spaced = (tmp_path / "Flickr8k.token.txt").read_text().replace(NAMES[0], "my dog.jpg").replace("there is", "there\u2028is")
    (tmp_path / "Flickr8k.token.txt").write_text(spaced)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("my dog.jpg\r\n")  # names end with lines, and lines with no other sign
    shutil.copy(tmp_path / "Flicker8k_Dataset" / NAMES[0], tmp_path / "Flicker8k_Dataset" / "my dog.jpg")
    assert load(Data(source="flickr8k", captions=str(tmp_path))).split("train").examples[0].captions == found.examples[0].captions
    (tmp_path / "Flickr_8k.devImages.txt").write_text("z.jpg\n")
    assert "Flickr8k.token.txt has no captions of image z.jpg" in fails(Data(source="flickr8k", captions=str(tmp_path)))
    for name in ("train", "dev", "test"):
        (tmp_path / f"Flickr_8k.{name}Images.txt").unlink()
    assert "Flickr_8k.devImages.txt" in fails(Data(source="flickr8k", captions=str(tmp_path)))


def write_folder(folder, names, rows):
    for name in names:
        picture(folder, name)
    lines = [json.dumps(dict(row, file_name=name)) for name in names for row in rows(name)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_image_folder_with_its_own_splits(tmp_path):
    for split, names in (("train", NAMES[:3]), ("validation", NAMES[3:5]), ("test", NAMES[5:])):
        write_folder(tmp_path / split, names, lambda name: [{"caption": text} for text in captions_of(name)])
    found = load(Data(source="datasets", images=str(tmp_path)))
    assert found.splits() == {"train": 3, "val": 2, "test": 1}
    assert {example.image_id for example in found.split("val").examples} == {"validation/d.jpg", "validation/e.jpg"}
    assert all(len(example.captions) == 2 for example in found.examples)
    assert found.image(found.split("test").examples[0]).shape == (16, 24, 3)


def test_image_folder_with_lists_of_captions_and_a_split_column(tmp_path):
    splits = dict(zip(NAMES, ["train", "train", "dev", "test", "train", "validation"], strict=True))
    write_folder(tmp_path, NAMES, lambda name: [{"said": captions_of(name), "split": splits[name]}])
    data = Data(source="datasets", images=str(tmp_path), captions="said")
    found = load(data)
    assert {example.image_id: example.split for example in found.examples} == dict(zip(NAMES, SPLITS, strict=True))
    assert found.examples[0].captions == ("A a sits here .", "there is a a")
    (tmp_path / "d.jpg").unlink()
    assert "1 of 6 images (16.7%) cannot be read" in fails(data)
    message = fails(Data(source="datasets", images=str(tmp_path), captions="siad"))
    assert message.endswith("has no column 'siad'; there are: image, said, split; did you mean 'said'?")
    assert "has no captions; its columns are: image, said, split" in fails(
        Data(source="datasets", images=str(tmp_path))
    )


def test_data_set_that_carries_its_images(tmp_path):
    import datasets

    for name in NAMES:
        picture(tmp_path / "files", name)
    rows = {
        "image": [{"bytes": (tmp_path / "files" / name).read_bytes(), "path": name} for name in NAMES],
        "caption": [captions_of(name)[0] for name in NAMES],
    }
    rows["image"][4]["bytes"] = b"no picture"
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=kinds)}).save_to_disk(tmp_path / "saved")
    found = load(Data(source="datasets", images=str(tmp_path / "saved"), max_unreadable=0.2))
    assert [example.image_id for example in found.examples] == [f"train/{name}" for name in NAMES if name != "e.jpg"]
    assert found.unreadable == ("train/e.jpg",)
    assert found.image(found.examples[1]).shape == (16, 24, 3)


def test_carried_images_are_told_apart_by_their_bytes(tmp_path):
    """As the hub carries a/1.jpg and b/1.jpg, which are other pictures; or one picture in a row for each caption, without a name."""
    import datasets

    for name in NAMES[:2]:
        picture(tmp_path / "files", name)
    first, second = ((tmp_path / "files" / name).read_bytes() for name in NAMES[:2])
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    carried = [(first, "1.jpg"), (second, "1.jpg"), (second, "1.jpg"), (first, None), (first, None)]
    carried += [(None, None), (None, None), (b"", "gone.jpg"), (b"", "gone.jpg")]
    pictures = [{"bytes": found, "path": path} for found, path in carried]
    rows = {"image": pictures, "caption": ["red", "blue", "sky", "fire", "sun", "a", "b", "c", "d"]}
    rows["image"][5] = rows["image"][6] = None
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=kinds)}).save_to_disk(tmp_path / "saved")
    found = load(Data(source="datasets", images=str(tmp_path / "saved"), max_unreadable=0.5))
    said = {example.image_id: example.captions for example in found.examples}
    other = f"train/1-{hashlib.sha256(second).hexdigest()[:16]}.jpg"
    assert said == {"train/1.jpg": ("red",), other: ("blue", "sky"), "train/row-000003": ("fire", "sun")}
    assert found.unreadable == ("train/row-000005", "train/row-000006", "train/gone.jpg")
    again = load(Data(source="datasets", images=str(tmp_path / "saved"), max_unreadable=0.5))
    assert again.fingerprint == found.fingerprint


def test_split_gives_its_examples_and_a_fingerprint_of_its_own(karpathy):
    found = load(karpathy())
    val = found.split("val")
    assert [example.image_id for example in val.examples] == ["c.jpg", "f.avif"] and len(val) == 2
    assert len({found.fingerprint, val.fingerprint, found.split("train").fingerprint}) == 3
    with pytest.raises(DataError) as error:
        found.split("tset")
    message = "dataset.json: there is no split 'tset'; there are: train (3), val (2), test (1); did you mean 'test'?"
    assert str(error.value) == message


def test_train_images_are_the_first_of_a_seeded_shuffle(karpathy):
    def change(images):
        for number in range(40):
            images.append(
                {"filename": NAMES[0], "split": "train", "sentences": [{"raw": "a b"}]} | {"filename": f"x{number}.jpg"}
            )

    data = karpathy(change)
    folder = Path(data.captions).parent / "images"
    for number in range(40):
        picture(folder, f"x{number}.jpg", size=(4, 4))
    chosen = {}
    for count, seed in ((10, 1), (20, 1), (10, 2)):
        limited = load(karpathy(train_images=count, val_images=1, seed=seed))
        assert limited.splits() == {"train": count, "val": 1, "test": 1}
        chosen[count, seed] = {example.image_id for example in limited.split("train").examples}
    assert chosen[10, 1] < chosen[20, 1] and chosen[10, 1] != chosen[10, 2]


# Errors.


def test_wrong_source_is_named():
    message = "data.source is 'cocoa'; there are: karpathy, coco, flickr8k, datasets, scenes; did you mean 'coco'?"
    assert fails(Data(source="cocoa")) == message
    assert set(SOURCES) == {"karpathy", "coco", "flickr8k", "datasets", "scenes"}


@pytest.mark.parametrize("source", ["karpathy", "coco", "flickr8k"])
def test_missing_captions_name_the_key(tmp_path, source):
    assert fails(Data(source=source)).startswith(
        f"data.captions is not set, and source '{source}' needs it: --set data.captions=PATH ("
    )
    assert fails(Data(source=source, captions=str(tmp_path / "no.json"))).startswith(
        f"data.captions: there is no file or folder {tmp_path / 'no.json'}: --set data.captions=PATH ("
    )


def test_missing_images_name_the_key(karpathy, tmp_path):
    message = fails(karpathy(images=str(tmp_path / "none")))
    assert message.startswith(f"data.images: there is no file or folder {tmp_path / 'none'}: --set data.images=PATH")
    data = karpathy()
    assert "is a file; the folder of the images is wanted" in fails(karpathy(images=data.captions))
    shutil.move(Path(data.captions).parent / "images", tmp_path / "elsewhere")
    assert fails(data).endswith(f"there is no folder 'images' beside {data.captions}: --set data.images=FOLDER")
    assert len(load(karpathy(images=str(tmp_path / "elsewhere")))) == 6


def test_datasets_need_a_folder_or_name(tmp_path):
    assert "--set data.images=PATH" in fails(Data(source="datasets"))
    missing = tmp_path / "none"
    assert fails(Data(source="datasets", images=str(missing))).startswith(f"data.images: {missing} does not exist")
    (tmp_path / "other.csv").write_text("file_name,caption\n")
    assert "is not metadata.csv or metadata.jsonl" in fails(
        Data(source="datasets", captions=str(tmp_path / "other.csv"))
    )
    picture(tmp_path / "bare", "a.png")
    assert "write metadata.csv with the columns file_name,caption" in fails(
        Data(source="datasets", images=str(tmp_path / "bare"))
    )
    (tmp_path / "bare" / "metadata.csv").write_bytes(b"\xff\xfe\x00garbage")
    assert "datasets cannot load" in fails(Data(source="datasets", images=str(tmp_path / "bare")))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "is an empty file"),
        ('{"images": [', "is no JSON (Expecting value, line 1)"),
        ("[" * 200_000, "is JSON nested too deeply"),
        ("[1, 2]", "is JSON that is a list, not an object"),
        ("3", "is JSON that is a number, not an object"),
        ('{"a": 1, "b": 2}', "is a JSON object with 'a', 'b'"),
        ("{}", "is an empty JSON object"),
    ],
)
@pytest.mark.parametrize("source", ["karpathy", "coco"])
def test_wrong_json_says_what_was_found_and_expected(tmp_path, source, content, found):
    path = tmp_path / "captions.json"
    path.write_text(content)
    (tmp_path / "images").mkdir()
    message = fails(Data(source=source, captions=str(path)))
    assert message.startswith(f"data.captions: {path} {found}; source '{source}' expects a JSON object with 'images'")


def test_captions_that_say_nothing_are_left_out():
    assert clean(["...", " ! ", "", None, 3, "a  dog\n.", "half \ud83d of it", "7"]) == ("a dog .", "half ? of it", "7")


def test_an_image_id_that_is_a_list_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": [1], "caption": "a dog"}]}))
    assert "JSON whose annotations[0] has no 'image_id' and 'caption'" in fails(Data(source="coco", captions=str(tmp_path / "c.json")))


def test_binary_captions_and_folders(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "captions.json"
    path.write_bytes(b"\xff\xd8\xff\xe0 jpeg")
    for source in ("karpathy", "coco", "flickr8k"):
        assert f"{path} is no UTF-8 text" in fails(Data(source=source, captions=str(path)))
        assert "images is a folder; source" in fails(Data(source=source, captions=str(tmp_path / "images")))


def test_another_sources_layout_is_recognised(karpathy, tmp_path):
    path = karpathy().captions
    (tmp_path / "images").mkdir()
    write_coco(tmp_path / "coco.json", NAMES)
    write_flickr8k(tmp_path)
    (tmp_path / "set" / "folder").mkdir()
    (tmp_path / "set" / "folder" / "metadata.csv").write_text("file_name,caption\n")
    paths = {
        "karpathy": path,
        "coco": str(tmp_path / "coco.json"),
        "flickr8k": str(tmp_path / "Flickr8k.token.txt"),
        "datasets": str(tmp_path / "set" / "folder"),
    }
    for source in ("karpathy", "coco", "flickr8k"):
        for other in set(paths) - {source}:
            message = fails(Data(source=source, captions=paths[other], images=str(tmp_path / "images")))
            assert message.endswith(f"; it looks like source '{other}': --set data.source={other}")
    assert (
        fails(Data(captions=path))
        == "data.captions is set, but source 'scenes' reads no file: --set data.source=karpathy"
    )


def test_wrong_entries_are_named_by_number(karpathy, tmp_path):
    assert "JSON whose images[2] has no 'split'" in fails(karpathy(lambda images: images[2].pop("split")))
    assert "JSON whose images[1] has no 'sentences'" in fails(karpathy(lambda images: images[1].pop("sentences")))
    (tmp_path / "images").mkdir()
    path = tmp_path / "captions_val.json"
    path.write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "caption": "x"}]})
    )
    assert "annotations[0] is of image id 7, which 'images' does not list" in fails(
        Data(source="coco", captions=str(path))
    )
    path.write_text(json.dumps({"images": [{"id": 1}], "annotations": []}))
    assert "JSON whose images[0] has no 'id' and 'file_name'" in fails(Data(source="coco", captions=str(path)))
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []}))
    assert "lists image id 1 more than once" in fails(Data(source="coco", captions=str(path)))


def test_empty_sets_duplicates_and_images_without_captions(karpathy):
    assert "has no captions of image b.avif; give" in fails(
        karpathy(lambda images: images[1].update(sentences=[{"raw": " "}]))
    )
    assert "lists image a.jpg more than once" in fails(karpathy(lambda images: images.append(images[0])))
    message = fails(karpathy(lambda images: images.clear()))
    assert message == "dataset.json holds no captions: choose another file with --set data.captions=PATH"


def test_settings_that_make_no_sense_are_refused(karpathy):
    assert "data.max_unreadable is 7" in fails(karpathy(max_unreadable=7))
    assert "data.image_size is for source 'scenes'" in fails(karpathy(image_size=80))
    assert fails(karpathy(train_images=0)) == "the number of train images is 0; it must be at least 1"


# Unreadable images.


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
    assert load(data, cache) == first and decoded == []
    record.write_text("{half")
    assert load(data, cache) == first and sorted(decoded) == NAMES
    decoded.clear()
    with monkeypatch.context() as other:  # another Pillow may read more
        other.setattr(photos, "made_by", lambda module: "f" * 64)
        assert load(data, cache) == first and sorted(decoded) == NAMES
    picture(Path(data.captions).parent / "images", "a.jpg")
    assert load(data, cache).unreadable == ("c.jpg", "d.jpg")


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
    np.testing.assert_array_equal(photos.decode(file, "a"), runtime.open_image(file))


# Fingerprints.


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


def test_importing_data_loads_neither_torch_nor_datasets():
    code = (
        "import sys, compress.data; print([name for name in ('torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
