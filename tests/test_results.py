"""Candidates matched with references, and what is wrong with either."""

import json

import pytest

from compress import results
from compress.errors import DataError

COCO = {
    "images": [{"id": 7}, {"id": 8}],
    "annotations": [
        {"image_id": 8, "caption": "a dog"},
        {"image_id": 7, "caption": "a cat"},
        {"image_id": 8, "caption": "the dog"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "imgid": 0, "split": "train", "sentences": [{"raw": "a tree"}]},
        {"filename": "b.jpg", "imgid": 1, "split": "val", "sentences": [{"raw": "a car"}, {"raw": "one car"}]},
        {"filename": "c.jpg", "imgid": 2, "split": "val", "sentences": [{"raw": "a bus"}]},
    ]
}


def pair(tmp_path, candidates, references):
    paths = tmp_path / "candidates.json", tmp_path / "references.json"
    for path, value in zip(paths, (candidates, references), strict=True):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return paths


def said(**captions):
    return [{"image_id": name, "caption": text} for name, text in captions.items()]


def test_coco(tmp_path):
    entries = [{"image_id": 7, "caption": "cat"}, {"image_id": 8, "caption": "dog"}]
    assert results.read(*pair(tmp_path, entries, COCO)) == (["dog", "cat"], [["a dog", "the dog"], ["a cat"]])


@pytest.mark.parametrize("names", [("b.jpg", "c.jpg"), (1, 2)])
def test_karpathy_by_file_name_or_number_within_the_split(tmp_path, names):
    entries = [{"image_id": name, "caption": f"said {name}"} for name in names]
    written, wanted = results.read(*pair(tmp_path, entries, KARPATHY))
    assert written == [f"said {name}" for name in names]
    assert wanted == [["a car", "one car"], ["a bus"]]


def test_karpathys_coco_is_named_by_cocos_ids_first(tmp_path):
    """Which are other images' places in the file, too."""
    images = [image | {"cocoid": cocoid} for image, cocoid in zip(KARPATHY["images"], (90, 2, 1), strict=True)]
    entries = [{"image_id": name, "caption": f"said {name}"} for name in (1, 2)]
    written, wanted = results.read(*pair(tmp_path, entries, {"images": images}))
    assert dict(zip(written, wanted, strict=True)) == {"said 2": ["a car", "one car"], "said 1": ["a bus"]}


def test_references_that_are_no_text_are_none(tmp_path):
    """A sentence without its raw text has its tokens; a file may begin with a byte order mark."""
    coco = {"annotations": [*COCO["annotations"], {"image_id": 7, "caption": None}]}
    entries = [{"image_id": 7, "caption": "cat"}, {"image_id": 8, "caption": "dog"}]
    assert results.read(*pair(tmp_path, entries, "\ufeff" + json.dumps(coco)))[1] == [["a dog", "the dog"], ["a cat"]]
    image = {"filename": "a.jpg", "split": "val", "sentences": [{"raw": None, "tokens": ["a", "cat"]}]}
    assert results.read(*pair(tmp_path, said(**{"a.jpg": "x"}), {"images": [image]}))[1] == [["a cat"]]


def test_a_subset_is_scored_where_it_is_asked_for(tmp_path):
    assert results.read(*pair(tmp_path, said(**{"c.jpg": "x"}), KARPATHY), subset=True) == (["x"], [["a bus"]])
    assert results.read(*pair(tmp_path, [{"image_id": 7, "caption": "x"}], COCO), subset=True) == (["x"], [["a cat"]])
    with pytest.raises(DataError, match="image_id d.jpg is not in"):
        results.read(*pair(tmp_path, said(**{"d.jpg": "x"}), KARPATHY), subset=True)


@pytest.mark.parametrize(
    ("candidates", "references", "expected"),
    [
        (said(**{"b.jpg": "x"}), KARPATHY, "no caption for image_id c.jpg of .*\\(1 such ids\\); --subset scores"),
        (said(**{"b.jpg": "x", "c.jpeg": "x"}), KARPATHY, "image_id c.jpeg is not in .*did you mean 'c.jpg'"),
        ([{"image_id": 7, "caption": "x"}] * 2, COCO, "image_id 7 has two captions"),
        ([{"image_id": 7}], COCO, "entry 0 is not"),
        ([], COCO, "a results file is a list"),
        ({}, COCO, "a results file is a list"),
        ("{", COCO, "candidates.json: is not JSON"),
        (said(a="x"), {"annotations": []}, "holds no reference caption"),
        (said(a="x"), {"annotations": [{"caption": "x"}]}, "an entry lacks 'image_id'"),
        (said(a="x"), [], "is neither COCO JSON"),
        (said(a="x"), {"annotations": [{"image_id": "a", "caption": None}]}, "image a has no reference caption"),
        (said(**{"b.jpg": "x"}), {"images": [KARPATHY["images"][1]] * 2}, "lists image b.jpg more than once"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, candidates, references, expected):
    with pytest.raises(DataError, match=expected) as caught:
        results.read(*pair(tmp_path, candidates, references))
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message


def test_a_file_that_is_not_there(tmp_path):
    candidates, references = pair(tmp_path, said(a="x"), COCO)
    with pytest.raises(DataError, match="did you mean 'references.json'"):
        results.read(candidates, tmp_path / "reference.json")
