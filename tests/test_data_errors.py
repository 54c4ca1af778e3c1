"""What is wrong with a caption set is said in one line, with what mends it."""

import json
import shutil
from pathlib import Path

import pytest
from caption_files import NAMES, fails, picture, write_coco, write_flickr8k

from compress.config import Data
from compress.data import SOURCES, layout, load


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


def test_metadata_of_other_images_is_refused(tmp_path):
    for folder in ("photos", "corrected"):
        picture(tmp_path / folder, "a.png")
        (tmp_path / folder / "metadata.csv").write_text("file_name,caption\na.png,a dog\n")
    said = fails(Data(source="datasets", captions=str(tmp_path / "corrected" / "metadata.csv"), images=str(tmp_path / "photos")))
    assert f"corrected/metadata.csv is not in {tmp_path / 'photos'}; source 'datasets' reads metadata.csv in the folder of" in said


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a.png", "train"), ("a.png", "val"), ("b.png", "val")], "has a.png in the splits 'train' and 'val'; name one"),
        ([("a.png", "train"), ("b.png", None)], "says no split of b.png; fill in its column 'split', or remove the column"),
    ],
)
def test_rows_that_leave_the_split_open_are_named(tmp_path, rows, said):
    for name in ("a.png", "b.png"):
        picture(tmp_path, name)
    lines = [json.dumps({"file_name": name, "caption": "a dog", "split": split}) for name, split in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert fails(Data(source="datasets", images=str(tmp_path))) == f"data.images: {tmp_path} {said}"


def test_what_datasets_hides_behind_its_own_words_is_said(tmp_path):
    picture(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": str(tmp_path / "a.png"), "caption": "a dog"}))
    assert "relative" in fails(Data(source="datasets", images=str(tmp_path)))


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


def test_another_sources_layout_is_recognised(karpathy, tmp_path, monkeypatch):
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
    assert layout.guess(f"{paths['coco']},{tmp_path / 'more.json'}") == "coco" and layout.guess("metadata.parquet") == "datasets"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert layout.guess("~/coco.json") == "coco"
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
