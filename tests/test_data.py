"""Readers on small files of each layout."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from caption_files import NAMES, SPLITS, captions_of, fails, picture, write_coco, write_flickr8k

from compress.config import Data
from compress.data import load
from compress.data.captions import clean, hashed_split
from compress.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


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


def test_karpathy_photos_of_one_name_in_two_folders(karpathy):
    def change(images):
        images[0] |= {"filepath": "one"}
        images[1] |= {"filename": images[0]["filename"], "filepath": "two"}

    data = karpathy(change)
    folder = Path(data.captions).parent / "images"
    picture(folder / "one", NAMES[0], (250, 0, 0))
    picture(folder / "two", NAMES[0], (0, 250, 0))
    found = load(data)
    assert [example.image_id for example in found.examples[:3]] == [f"one/{NAMES[0]}", f"two/{NAMES[0]}", NAMES[2]]
    assert [int(found.image(example)[0, 0].argmax()) for example in found.examples[:2]] == [0, 1]


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
    (tmp_path / "Flickr_8k.devImages.txt").write_text("my dog.jpg\n")
    twice = "Flickr_8k.devImages.txt lists my dog.jpg, which Flickr_8k.trainImages.txt has already; list each image once"
    assert twice in fails(Data(source="flickr8k", captions=str(tmp_path)))
    (tmp_path / "Flickr_8k.devImages.txt").write_text("z.jpg\n")
    assert "Flickr8k.token.txt has no captions of image z.jpg" in fails(Data(source="flickr8k", captions=str(tmp_path)))
    for name in ("train", "dev", "test"):
        (tmp_path / f"Flickr_8k.{name}Images.txt").unlink()
    assert "Flickr_8k.devImages.txt" in fails(Data(source="flickr8k", captions=str(tmp_path)))


def write_folder(folder, names, rows):
    for name in names:
        picture((folder / name).parent, Path(name).name)
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


def test_names_that_speak_of_splits_are_names(tmp_path):
    """`datasets` alone would take train_1.png for the whole of a split, and the folder `test` for another."""
    names = ["train_1.png", "steam train.png", "test/b.png", "c.png"]
    write_folder(tmp_path, names, lambda name: [{"caption": "a b"}])
    write_folder(tmp_path / "val", ["own.png"], lambda name: [{"caption": "its own"}])
    found = load(Data(source="datasets", captions=str(tmp_path / "metadata.jsonl")))
    assert {example.image_id for example in found.examples} == {*names, "val/own.png"}
    assert load(Data(source="datasets", captions=str(tmp_path), images=str(tmp_path))).fingerprint == found.fingerprint


def test_folders_of_splits_under_one_metadata_file(tmp_path):
    write_folder(tmp_path, ["train/a.png", "train/b.png", "dev/c.png", "test/d.png"], lambda name: [{"caption": "a b"}])
    assert load(Data(source="datasets", images=str(tmp_path))).splits() == {"train": 2, "val": 1, "test": 1}
    one = tmp_path / "one"
    write_folder(one, [f"train/{number}.png" for number in range(40)], lambda name: [{"caption": "a b"}])
    assert set(load(Data(source="datasets", images=str(one))).splits()) == {"train", "val", "test"}  # drawn


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


def test_other_validation_images_leave_the_training_images_as_they_are(karpathy):
    found, fewer = load(karpathy()), load(karpathy(val_images=1))
    assert fewer.fingerprint != found.fingerprint and fewer.split("train").fingerprint == found.split("train").fingerprint
    assert fewer.split("val").fingerprint != found.split("val").fingerprint
    assert load(karpathy(train_images=1)).split("train").fingerprint != found.split("train").fingerprint
    scenes, more = (load(Data(train_images=6, val_images=count)) for count in (3, 4))
    assert scenes.split("train").fingerprint == more.split("train").fingerprint
    assert len({scenes.fingerprint, more.fingerprint, scenes.split("val").fingerprint, more.split("val").fingerprint}) == 4


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


def test_captions_that_say_nothing_are_left_out():
    assert clean(["...", " ! ", "", None, 3, "a  dog\n.", "half \ud83d of it", "7"]) == ("a dog .", "half ? of it", "7")


def test_importing_data_loads_neither_torch_nor_datasets():
    code = (
        "import sys, compress.data; print([name for name in ('torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
