"""Regions and proposals, from small files in the formats of Visual Genome, COCO and COCO results; boxes are compared with sums by hand."""

import json

import pytest

from compress.data.regions import Region, read_boxes, read_regions, read_sizes
from compress.errors import DataError

CONCEPTS = ("tree", "man", "hot dog", "car", "trunk")
LABELLED = "expected is Visual Genome's objects.json (image_id, objects) or COCO's instances_*.json (images, annotations, categories)"
SIZES = {"a.jpg": (200, 100), "b.jpg": (50, 50), "000000000009.jpg": (10, 20), "COCO_val2014_000000000042.jpg": (4, 4)}


def labelled(path, *more):
    """The regions of one file."""
    return read_regions([path], *more)


def thing(x, y, w, h, *names):
    return {"synsets": ["thing.n.01"], "h": h, "object_id": 1058549, "merged_object_ids": [], "names": list(names), "w": w, "y": y, "x": x}


@pytest.fixture
def genome(tmp_path):
    """Two images of Visual Genome in its two files; returns a function that writes them, after `change` has edited both, and the path."""
    sizes = [
        {"width": 200, "url": "https://example.org/VG_100K_2/1.jpg", "height": 100, "image_id": 1, "coco_id": None, "flickr_id": None},
        {"width": 50, "url": "https://example.org/VG_100K/2407.jpg", "height": 80, "image_id": 2407, "coco_id": 7, "flickr_id": 8},
        {"width": 5, "url": "https://example.org/VG_100K/3.jpg", "height": 8, "image_id": 3, "coco_id": None, "flickr_id": None},
    ]
    objects = [
        {"image_id": 1, "image_url": "https://example.org/1.jpg", "objects": [
            thing(20, 10, 100, 50, "trees"), thing(0, 0, 200, 100, "sky"),
        ]},
        {"image_id": 2407, "image_url": "https://example.org/2407.jpg", "objects": [
            thing(-5, 40, 15, 60, "young man"), thing(1, 2, 3, 4, "pole", "tree trunk"), thing(5, 5, 0, 9, "tree"),
            thing(50, 0, 5, 5, "tree"), thing(9, 9, 9, -1, "tree"), thing(0, 0, 1, 1, "sky"), thing(0, 0, 1, 1),
            thing(0, 0, 25, 20.0, "hotdog"),
        ]},
    ]

    def write(change=None):
        if change:
            change(objects, sizes)
        (tmp_path / "image_data.json").write_text(json.dumps(sizes))
        (tmp_path / "objects.json").write_text(json.dumps(objects))
        return tmp_path / "objects.json"

    return write


@pytest.fixture
def instances(tmp_path):
    """COCO's instances of three images; returns a function that writes them, after `change` has edited them, and the path."""
    found = {
        "info": {"year": 2017},
        "images": [
            {"license": 4, "file_name": "000000000009.jpg", "coco_url": "", "height": 480, "width": 640, "id": 9},
            {"license": 4, "file_name": "000000000025.jpg", "coco_url": "", "height": 100, "width": 50, "id": 25},
            {"license": 4, "file_name": "000000000030.jpg", "coco_url": "", "height": 100, "width": 50, "id": 30},
        ],
        "annotations": [
            annotation(9, 3, [64, 48.0, 320, 240]), annotation(25, 58, [0, 0, 50, 100]), annotation(9, 58, [0, 0, 6.4, 480]),
            annotation(30, 13, [1, 1, 2, 2]), annotation(9, 3, [3, 3, 0, 0]),
        ],
        "categories": [
            {"supercategory": "vehicle", "id": 3, "name": "car"}, {"supercategory": "food", "id": 58, "name": "hot dog"},
            {"supercategory": "outdoor", "id": 13, "name": "stop sign"},
        ],
    }

    def write(change=None):
        if change:
            change(found)
        (tmp_path / "instances_val2017.json").write_text(json.dumps(found))
        return tmp_path / "instances_val2017.json"

    return write


def annotation(image, category, bbox):
    outline = {"segmentation": [[1.0, 2.0, 3.0, 4.0]], "area": 4.0, "iscrowd": 0}
    return outline | {"image_id": image, "bbox": bbox, "category_id": category, "id": 1}


def boxes(tmp_path, *entries):
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    return tmp_path / "boxes.json"


def box(image, bbox, score):
    return {"image_id": image, "category_id": 1, "bbox": bbox, "score": score}


def fails(read, *arguments):
    with pytest.raises(DataError) as error:
        read(*arguments)
    assert error.value.exit_code == 2
    return str(error.value)


# Visual Genome.


def test_visual_genome(genome):
    found = labelled(genome(), CONCEPTS)
    assert found == {
        "1": (Region((0.1, 0.1, 0.6, 0.6), 0, 1.0),),
        "2407": (
            Region((0.0, 0.5, 0.2, 1.0), 1, 1.0),  # x -5..10 of 50, y 40..100 of 80: cut off at 0 and 80
            Region((0.02, 0.025, 0.08, 0.075), 4, 1.0),
            Region((0.0, 0.0, 0.5, 0.25), 2, 1.0),
        ),
    }
    assert found.unnamed == {"sky": 2, "": 1} and found.empty == 3


def test_an_image_is_found_by_its_file_or_by_cocos_id(genome, instances):
    found = labelled(genome(), CONCEPTS)
    for name in ("2407", "2407.jpg", "VG_100K/2407.jpg", "000000000007.jpg", "COCO_val2014_000000000007.jpg"):
        assert found.of_image(name) == found["2407"], name
    assert not any(found.of_image(name) for name in ("000000002407.jpg", "COCO_val2014_000000000001.jpg", "7.jpg", "dog.jpg"))
    coco = labelled(instances(), CONCEPTS)
    for name in ("000000000009.jpg", "COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000009.jpg"):
        assert coco.of_image(name) == coco["000000000009.jpg"], name
    assert not coco.of_image("9.jpg") and not coco.of_image("000000000030.jpg")


def test_image_sizes_may_lie_elsewhere(genome, tmp_path):
    path = genome()
    (tmp_path / "sizes").mkdir()
    beside = labelled(path, CONCEPTS)
    other = (tmp_path / "image_data.json").rename(tmp_path / "sizes" / "v1.json")
    assert labelled(str(path), CONCEPTS, str(other)) == beside
    assert fails(labelled, path, CONCEPTS) == (
        f"{path} is of Visual Genome, which keeps the sizes of its images in image_data.json, and there is no {tmp_path}/image_data.json: "
        "put image_data.json beside objects.json, or name it"
    )
    assert read_sizes(other) == {"1": (200, 100), "2407": (50, 80), "3": (5, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda objects, sizes: objects[1].pop("image_id"), "objects.json is JSON whose [1] has no 'image_id' and 'objects'; expected is "),
        (lambda objects, sizes: objects.append([]), "objects.json is JSON whose [2] has no 'image_id' and 'objects'; expected is "),
        (
            lambda objects, sizes: objects[1]["objects"][2].pop("h"),
            "objects.json is JSON whose [1].objects[2] has no 'x', 'y', 'w', 'h' and 'names'; expected is ",
        ),
        (lambda objects, sizes: objects[0]["objects"][1].update(names="sky"), "[0].objects[1] has no 'x', 'y', 'w', 'h' and 'names'"),
        (lambda objects, sizes: objects[0]["objects"][1].update(x="1"), "[0].objects[1] has no 'x', 'y', 'w', 'h' and 'names'"),
        (
            lambda objects, sizes: sizes.pop(1),
            "objects.json: [1] is of image id 2407, which {}/image_data.json does not list: take both files from one version of Visual "
            "Genome",
        ),
        (lambda objects, sizes: sizes[2].update(width=0), "image_data.json is JSON whose [2] has no 'image_id', 'width' and 'height'"),
        (lambda objects, sizes: sizes.append(sizes[0]), "image_data.json lists image id 1 more than once; each image must"),
        (lambda objects, sizes: sizes.clear(), "image_data.json is an empty list; expected is Visual Genome's image_data.json"),
    ],
)
def test_wrong_entries_of_visual_genome(genome, tmp_path, change, message):
    assert message.replace("{}", str(tmp_path)) in fails(labelled, genome(change), CONCEPTS)


# COCO.


def test_coco_instances(instances):
    found = labelled(instances(), CONCEPTS)
    assert found == {
        "000000000009.jpg": (Region((0.1, 0.1, 0.6, 0.6), 3, 1.0), Region((0.0, 0.0, 0.01, 1.0), 2, 1.0)),
        "000000000025.jpg": (Region((0.0, 0.0, 1.0, 1.0), 2, 1.0),),
    }
    assert found.unnamed == {"stop sign": 1} and found.empty == 1
    sizes = {"000000000009.jpg": (640, 480), "000000000025.jpg": (50, 100), "000000000030.jpg": (50, 100)}
    assert read_sizes(instances()) == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: found["images"][0].pop("width"),
            " is JSON whose images[0] has no 'id', 'file_name', 'width' and 'height'; expected is ",
        ),
        (lambda found: found["images"].append(found["images"][1]), " lists image id 25 more than once; each image must stand there once"),
        (lambda found: found["categories"][1].pop("name"), " is JSON whose categories[1] has no 'id' and 'name'; expected is "),
        (
            lambda found: found["annotations"][1].update(bbox=[1, 2, 3]),
            " is JSON whose annotations[1] has no 'image_id', 'category_id' and 'bbox' (four numbers); expected is ",
        ),
        (lambda found: found["images"].pop(0), ": annotations[0] is of image id 9, which 'images' does not list: fetch it again"),
        (lambda found: found["categories"].pop(0), ": annotations[0] is of category id 3, which 'categories' does not list: fetch it"),
        (lambda found: found.pop("categories"), " is a JSON object with 'info', 'images', 'annotations'; expected is "),
        (
            lambda found: found.update(annotations=found["annotations"][3:]),
            " has no region that is of a concept (1 empty boxes; names that are no concept: 'stop sign'): choose another file, "
            "or add concepts to the list",
        ),
        (lambda found: found["annotations"].clear(), " has no region that is of a concept (0 empty boxes): choose another file, or"),
    ],
)
def test_wrong_entries_of_coco(instances, change, message):
    path = instances(change)
    assert fails(labelled, path, CONCEPTS).startswith(f"{path}{message}")


# A detector's boxes.


def test_several_files(genome, instances, tmp_path):
    """As COCO's years are."""
    first = instances()
    one = read_regions([first], CONCEPTS)
    other = tmp_path / "instances_val.json"
    other.write_text(first.read_text().replace("000000000009.jpg", "000000000042.jpg"))
    both = read_regions([first, str(other)], CONCEPTS)
    assert both["000000000009.jpg"] == both["000000000042.jpg"] == one["000000000009.jpg"]
    assert both["000000000025.jpg"] == 2 * one["000000000025.jpg"]
    assert both.unnamed == one.unnamed + one.unnamed and both.empty == 2 * one.empty
    assert both.of_image("COCO_val2014_000000000042.jpg") == one["000000000009.jpg"]
    with pytest.raises(DataError, match="there is no file .*none.json"):
        read_regions([first, tmp_path / "none.json"], CONCEPTS)
    with pytest.raises(DataError, match="objects.json is of Visual Genome, which is read by itself; several files are COCO's"):
        read_regions([first, genome()], CONCEPTS)


def test_boxes(tmp_path):
    path = boxes(
        tmp_path,
        box("a.jpg", [20, 10, 100, 50], 0.25),
        box("b.jpg", [0, 0, 100, 25], 0.5),
        {"image_id": "a.jpg", "bbox": [0.0, 0.0, 20.0, 100.0], "score": 0.75},
        box("a.jpg", [200, 0, 10, 10], 0.9),
        box("a.jpg", [0, 0, -10, 10], 0.9),
        box("a.jpg", [0, 0, float("nan"), 10], 0.9),
        box("a.jpg", [0, 0, float("inf"), 10**400], 0.9),
        box("a.jpg", [0, 0, 200, 100], 0.25),
    )
    found = read_boxes(path, SIZES)
    assert found == {
        "a.jpg": (Region((0, 0, 0.1, 1), None, 0.75), Region((0.1, 0.1, 0.6, 0.6), None, 0.25), Region((0, 0, 1, 1), None, 0.25)),
        "b.jpg": (Region((0, 0, 1, 0.5), None, 0.5),),
    }
    assert found.empty == 4 and not found.unnamed


def test_boxes_by_number_and_by_name_without_extension(tmp_path):
    for image, key in ((9, "000000000009.jpg"), ("9", "000000000009.jpg"), ("a", "a.jpg"), (42, "COCO_val2014_000000000042.jpg")):
        assert list(read_boxes(boxes(tmp_path, box(image, [0, 0, 2, 2], 1)), SIZES)) == [key]
    found = read_boxes(boxes(tmp_path, box(42, [0, 0, 2, 2], 1)), SIZES)
    assert found.of_image("000000000042.jpg") == found.of_image("COCO_val2014_000000000042.jpg") != ()  # one picture, named by two years
    genome = {"2407": (10, 10)}
    assert read_boxes(boxes(tmp_path, box(2407, [0, 0, 5, 5], 1)), genome) == {"2407": (Region((0, 0, 0.5, 0.5), None, 1.0),)}
    twice = {"train/x.jpg": (1, 1), "val/x.jpg": (1, 1)}
    assert list(read_boxes(boxes(tmp_path, box("val/x.jpg", [0, 0, 1, 1], 1)), twice)) == ["val/x.jpg"]
    assert "is of image id x, which is none of the 2 images'" in fails(read_boxes, boxes(tmp_path, box("x", [0, 0, 1, 1], 1)), twice)


def test_wrong_boxes(tmp_path):
    good = box("a.jpg", [0, 0, 1, 1], 0.5)
    entry = "has no 'image_id', 'bbox' (four numbers) and 'score' (a number); expected is a list of boxes in COCO's results format"
    for bad in ({"score": None}, {"score": float("nan")}, {"score": True}, {"bbox": [0, 0, 1, "1"]}, {"bbox": {}}, {"image_id": 1.5}):
        path = boxes(tmp_path, good, good | bad)
        assert fails(read_boxes, path, SIZES).startswith(f"{path} is JSON whose [1] {entry}"), bad
    path = boxes(tmp_path, good, box(8, [0, 0, 1, 1], 0.5))
    assert fails(read_boxes, path, SIZES) == (
        f"{path}: [1] is of image id 8, which is none of the 4 images': run the detector on the images that the captions name, with their "
        "file names or COCO's ids as image_id"
    )


# Files that are something else.


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b'[{"image_id": 1, "obj', "no JSON (Unterminated string starting at, line 1; if it is half a download, fetch it again)"),
        (b'[{"image_id": 1},\n', "no JSON (Expecting value, line 2; if it is half a download, fetch it again)"),
        (b"[" * 200_000, "JSON nested too deeply"),
        (b"9" * 5000, "no JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; "),
        (b"PK\x03\x04\xff\xfe", "no UTF-8 text (if it is an archive, unpack it)"),
        (b"[]", "an empty list"),
        (b"{}", "an empty JSON object"),
        (b"[1]", "a list, but not of objects"),
        (b"17", "JSON that is neither a list nor an object"),
        (b'[{"id": 1, "regions": []}]', "a list whose first entry is a JSON object with 'id', 'regions'"),
    ],
)
def test_other_files_say_what_was_found_and_expected(tmp_path, content, found):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    for read, *more in ((labelled, CONCEPTS), (read_sizes,), (read_boxes, SIZES)):
        message = fails(read, path, *more)
        assert message.startswith(f"{path} is {found}") and "expected is " in message
    assert fails(labelled, path, CONCEPTS).endswith(LABELLED)


def test_absent_files_and_folders(tmp_path):
    for read, *more in ((labelled, CONCEPTS), (read_sizes,), (read_boxes, SIZES)):
        assert fails(read, tmp_path / "none.json", *more).startswith(f"there is no file {tmp_path}/none.json; expected is ")
        assert fails(read, tmp_path, *more).startswith(f"{tmp_path} is a folder; expected is ")


def test_formats_taken_for_another(genome, instances, tmp_path):
    genome()
    instances()
    boxes(tmp_path, box("a.jpg", [0, 0, 1, 1], 0.5))
    first = "a list whose first entry is a JSON object with"
    for name, read, more, found in (
        ("boxes.json", labelled, CONCEPTS, f"{first} 'image_id', 'category_id', 'bbox', 'score'"),
        ("image_data.json", labelled, CONCEPTS, f"{first} 'width', 'url', 'height', 'image_id', ..."),
        ("objects.json", read_boxes, SIZES, f"{first} 'image_id', 'image_url', 'objects'"),
        ("instances_val2017.json", read_boxes, SIZES, "a JSON object with 'info', 'images', 'annotations', 'categories'"),
    ):
        assert fails(read, tmp_path / name, more).startswith(f"{tmp_path / name} is {found}; expected is "), name
    assert fails(read_sizes, tmp_path / "objects.json").startswith(f"{tmp_path}/objects.json is {first} 'image_id', 'image_url', ")
