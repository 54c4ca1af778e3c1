import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tiny_captioner as tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from compress import runtime
from compress.decode import Special, beam_search
from students.lightcap.fusion import PREFIX_POSITION
from students.lightcap.tokenizer import decode_caption


def photo(mode="RGB", size=(40, 30)):
    noise = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def test_pixels_equal_torchvisions_squash_and_normalisation():
    image = photo(size=(90, 61))
    squashed = functional.resize(image, [80, 80], InterpolationMode.BICUBIC)
    expected = functional.normalize(functional.to_tensor(squashed), tiny.SETTINGS["mean"], tiny.SETTINGS["std"])
    got = runtime.pixels(image, tiny.SETTINGS)
    assert got.shape == (3, 80, 80) and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(runtime.pixels(np.asarray(image), tiny.SETTINGS), got)


def test_an_array_of_the_right_size_is_not_resampled():
    image = tiny.pictures(1)[0]
    mean, std = (np.array(tiny.SETTINGS[key])[:, None, None] for key in ("mean", "std"))
    back = runtime.pixels(image, tiny.SETTINGS) * std + mean
    np.testing.assert_array_equal((back * 255).round().astype(np.uint8), image.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode):
    image = photo("L").convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else photo(mode)
    array = np.asarray(runtime.flat(image))
    assert array.shape == (30, 40, 3) and array.dtype == np.uint8
    if mode in ("L", "I;16"):
        np.testing.assert_array_equal(array[..., 0], np.asarray(photo("L")))


def test_what_is_transparent_becomes_white():
    assert (np.asarray(runtime.flat(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == 255).all()


def test_a_file_is_turned_upright(tmp_path):
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(runtime.open_photo(tmp_path / "turned.png"), np.rot90(np.asarray(image), -1))


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_and_looks_the_same(captioner, tmp_path):
    coarse = np.random.default_rng(4).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((2400, 1800), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "large.jpg", quality=92, exif=exif)
    opened = captioner.open(tmp_path / "large.jpg")
    assert opened.size == (450, 600)  # a quarter, upright; an eighth would have less than 4 x 80 pixels
    whole = np.asarray(runtime.open_photo(tmp_path / "large.jpg"))
    assert whole.shape == (2400, 1800, 3)
    difference = np.abs(runtime.squash(opened, tiny.SETTINGS).astype(int) - runtime.squash(whole, tiny.SETTINGS))
    assert difference.max() <= 2
    image.resize((600, 450)).save(tmp_path / "small.jpg")
    np.testing.assert_array_equal(captioner.open(tmp_path / "small.jpg"), runtime.open_photo(tmp_path / "small.jpg"))


def test_a_photo_is_squashed_without_a_copy_of_it():
    image = photo(size=(90, 61))
    assert runtime.flat(image) is image
    np.testing.assert_array_equal(runtime.squash(image, tiny.SETTINGS), runtime.squash(np.asarray(image), tiny.SETTINGS))


def saturating(path) -> int:
    """Writes x @ w of uint8 and int8, two products of 255 x 127; what they sum to is above 2^15."""
    inputs = helper.make_tensor_value_info("x", TensorProto.UINT8, None)
    outputs = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    weight = numpy_helper.from_array(np.full((2, 16), 127, np.int8), "w")
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "sums", [inputs], [outputs], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return 2 * 255 * 127


def test_sums_of_products_are_exact_on_every_processor(tmp_path):
    """On x86 without VNNI, ONNX Runtime's own choice of products gives 32,767."""
    wanted = saturating(tmp_path / "sums.onnx")
    session = runtime.open_session(tmp_path / "sums.onnx", runtime.session_options(1))
    found = session.run(None, {"x": np.full((1, 2), 255, np.uint8)})[0]
    assert found.shape == (1, 16) and (found == wanted).all()


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize(
    ("cpuinfo", "quantized", "exact"),
    [
        ("flags : fpu sse2 avx2", {"scheme": "static"}, True),
        ("flags : fpu sse2 avx2 avx512f", {"scheme": "static", "reduce_range": False}, True),
        ("flags : fpu sse2 avx2", {"scheme": "static", "reduce_range": True}, False),
        ("flags : fpu sse2 avx2", None, True),
        ("flags : fpu sse2 avx2 avx_vnni", {"scheme": "static"}, False),
        ("Features : fp asimd", {"scheme": "static"}, False),
        ("AMD64", {"scheme": "static"}, True),  # Windows does not say
        ("x86_64", {"scheme": "static", "reduce_range": True}, False),
        ("arm64", {"scheme": "static"}, False),
    ],
)
def test_exact_products_are_asked_for_where_fast_ones_saturate(folder, tmp_path, monkeypatch, cpuinfo, quantized, exact, readable):
    for file in runtime.FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | ({"quantized": quantized} if quantized else {})))
    monkeypatch.setattr(runtime.platform, "machine", lambda: cpuinfo)
    if ":" in cpuinfo:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{cpuinfo}\n")
    monkeypatch.setattr(runtime, "CPUINFO", tmp_path / "cpuinfo")
    asked, options = [], runtime.session_options
    monkeypatch.setattr(runtime, "session_options", lambda *given, **named: asked.append(options(*given, **named)) or asked[-1])
    made = []
    monkeypatch.setattr(runtime, "unsigned", lambda path: made.append(path) or (path.read_bytes() if readable else None))
    runtime.Captioner(tmp_path, threads=1)
    unsigned = exact and quantized is not None  # and then the encoder, made unsigned, has nothing to be asked for
    assert len(asked) == 1 + (unsigned and readable)
    whole, encoder = asked[0], asked[-1]
    assert made == ([tmp_path / "encoder.onnx"] if unsigned else [])
    for one, wanted in ((whole, exact), (encoder, exact and not (unsigned and readable))):
        if wanted:
            assert one.get_session_config_entry("session.x64quantprecision") == "1"
        else:
            with pytest.raises(RuntimeError, match="x64quantprecision"):
                one.get_session_config_entry("session.x64quantprecision")


def test_images_and_settings_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    for path, words in ((tmp_path / "torn.jpg", "not a readable image"), (tmp_path / "none.jpg", "no such image")):
        with pytest.raises(ValueError, match=words) as caught:
            runtime.open_photo(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="crop"):
        runtime.pixels(tiny.pictures(1)[0], tiny.SETTINGS | {"resize": "crop"})
    with pytest.raises(ValueError, match=r"\(80, 80\)"):
        runtime.pixels(tiny.pictures(1)[0][..., 0], tiny.SETTINGS)


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("max_tokens", [4, 12])
def test_the_search_equals_pytorchs(model, captioner, beam, max_tokens):
    grid = torch.randn(6, 25, 128, generator=torch.Generator().manual_seed(beam))
    expected = beam_search(model, grid, Special.of(captioner.tokenizer), beam=beam, max_tokens=max_tokens)
    got = captioner.decode(grid.numpy(), beam=beam, max_tokens=max_tokens)
    assert [text for text, _ in got] == [decode_caption(captioner.tokenizer, found.tokens) for found in expected]
    np.testing.assert_allclose([logprob for _, logprob in got], [found.logprob for found in expected], atol=1e-3)
    assert len({text for text, _ in got}) > 1


class Table(runtime.Captioner):
    """A captioner whose next-piece scores are a table by position and last piece: 0 [PAD], 1 [CLS], 2 [SEP], then words."""

    def __init__(self, logits):
        self.logits, self.start, self.end, self.never = logits, 1, 2, [0, 1]

    def prefill(self, grid):
        return runtime.Past([grid], [grid])

    def step(self, tokens, position, past):
        return self.logits[position, tokens], past


def test_a_wide_beam_finds_the_best_of_all_captions():
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 2, (3, 6, 6)).astype(np.float32)
        logs = torch.from_numpy(logits).log_softmax(-1).numpy()
        scored = []
        for length in range(4):
            for words in itertools.product((3, 4, 5), repeat=length):
                ids = [1, *words] if length == 3 else [1, *words, 2]
                total = sum(logs[position, a, b] for position, (a, b) in enumerate(itertools.pairwise(ids)))
                scored.append((total / (len(ids) - 1), total, list(words)))
        _, total, words = max(scored)
        ((found, logprob),) = Table(logits).search(np.zeros((1, 1)), beam=100, max_tokens=3)
        assert found == words
        assert logprob == pytest.approx(total, abs=1e-5)


def test_scores_that_are_no_numbers_are_damage():
    captioner = Table(np.full((3, 6, 6), np.nan, np.float32))
    captioner.folder = "there"
    with pytest.raises(ValueError, match="^there: what its graphs compute are no numbers: the files are damaged; copy them again$"):
        captioner.search(np.zeros((2, 1)), beam=2, max_tokens=3)


def test_prefixes_are_copied_only_where_captions_of_other_images_go_on():
    """Two images, beam 2: from one caption each to two; while both go on only what captions hold of their own moves; one ends."""
    logits = np.zeros((3, 6, 6), np.float32)
    logits[:, :, 2] = -9.0
    logits[1, 3, 2] = logits[1, 4, 2] = 9.0  # where the first piece is 3 or 4, the second is [SEP]
    logits[2, 5, 4] = 6.0  # and of the two that go on then, one has both of the best that follow
    moved = []

    class Watched(runtime.Past):
        def rows(self, captions, same_images):
            moved.append((list(captions), same_images))
            return Watched(*super().rows(captions, same_images))

    table = Table(logits)
    table.prefill = lambda grid: Watched([grid], [grid])
    table.step = lambda tokens, position, past: (logits[position, tokens] + past.prefix[0], past)
    shown = np.array([[0.0] * 3 + [5.0, 4.0, 0.0], [0.0] * 5 + [5.0]], np.float32)  # pieces 3 and 4 in the first, 5 in the second
    table.search(shown, beam=2, max_tokens=3)
    assert moved == [([0, 0, 1, 1], False), ([2, 2], False), ([0, 0], True)]


def test_an_export_of_an_earlier_lightcap_is_one_line(folder, tmp_path):
    """Prefix and step were one graph once."""
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "prefix.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"old: made by an earlier lightcap; make it anew \(lightcap run, lightcap export\)$"):
        runtime.Captioner(tmp_path / "old")


PREPROCESSOR = {"image_size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("config.json", [], "config.json: not a JSON object"),
        ("preprocessor_config.json", [], "preprocessor_config.json: not a JSON object"),
        ("preprocessor_config.json", {}, "needs image_size, pixels, and mean and std, three numbers each"),
        ("preprocessor_config.json", PREPROCESSOR | {"image_size": "x"}, "needs image_size"),
        ("preprocessor_config.json", PREPROCESSOR | {"image_size": 0}, "needs image_size"),
        ("preprocessor_config.json", PREPROCESSOR | {"std": [0.5]}, "needs image_size"),
        ("preprocessor_config.json", PREPROCESSOR | {"mean": 0.5}, "needs image_size"),
        ("preprocessor_config.json", PREPROCESSOR | {"image_size": 1000}, "image_size is 1000, but encoder.onnx reads"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, tmp_path, name, value, said):
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=said) as raised:
        runtime.Captioner(tmp_path / "changed")
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_weights_cut_short_are_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "decoder.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-200])
    said = r"cut/(prefix|decoder)\.onnx: ONNX Runtime cannot open it \([^\n]*\); copy it again, or make it anew$"
    with pytest.raises(ValueError, match=said):
        runtime.Captioner(tmp_path / "cut")


def test_equal_scores_go_to_the_lower_piece():
    ((found, _),) = Table(np.zeros((2, 6, 6), np.float32)).search(np.zeros((1, 1)), beam=1, max_tokens=2)
    assert found == []  # [SEP] is the lowest piece that may come
    logits = np.zeros((2, 6, 6), np.float32)
    logits[:, :, 2] = -1
    ((found, _),) = Table(logits).search(np.zeros((1, 1)), beam=1, max_tokens=2)
    assert found == [3, 3]


def test_captions_take_files_arrays_and_pixels(captioner, tmp_path):
    pictures = tiny.pictures(3)
    Image.fromarray(pictures[0]).save(tmp_path / "0.png")
    expected = captioner.captions(tiny.pixels(pictures))
    got = captioner.captions([tmp_path / "0.png", Image.fromarray(pictures[1]), pictures[2]])
    assert [text for text, _ in got] == [text for text, _ in expected]
    np.testing.assert_allclose([score for _, score in got], [score for _, score in expected], atol=1e-4)


def script(folder, *arguments):
    return subprocess.run([sys.executable, folder / "caption.py", *map(str, arguments)], capture_output=True, text=True)


def test_the_script_goes_on_after_an_unreadable_photo_and_exits_1(folder, captioner, tmp_path):
    photo().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no")
    done = script(folder, tmp_path / "bad.png", tmp_path / "good.png")
    assert done.returncode == 1
    assert done.stdout == f"{tmp_path / 'good.png'}\t{captioner.caption(tmp_path / 'good.png')[0]}\n"
    assert done.stderr.startswith("caption.py: ") and done.stderr.count("\n") == 1
    done = script(folder, "--json", tmp_path / "bad.png")
    assert done.returncode == 1 and set(json.loads(done.stdout)[0]) == {"image", "error"}


def test_the_script_prints_names_that_are_no_utf8(folder, captioner, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    photo().save(tmp_path / "good.png")
    os.rename(tmp_path / "good.png", name)
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    plain, listed = (subprocess.run([sys.executable, folder / "caption.py", *more, name], capture_output=True, env=strict)
                     for more in ((), ("--json",)))
    assert (plain.returncode, plain.stderr) == (0, b"") and plain.stdout.startswith(name + b"\t")
    assert os.fsencode(json.loads(listed.stdout)[0]["image"]) == name and listed.stderr == b""


def test_the_script_says_once_that_pillow_is_absent(folder, tmp_path):
    (tmp_path / "PIL.py").write_text("raise ImportError('no Pillow here')")
    done = subprocess.run([sys.executable, folder / "caption.py", "a.png", "b.png"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "caption.py: no Pillow here\n")


def test_nobody_has_to_read_all_that_the_script_says(folder, tmp_path):
    photo().save(tmp_path / "good.png")
    command = [sys.executable, folder / "caption.py", tmp_path / "good.png"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    with running.stderr as said:
        assert said.read() == b"" and running.wait() == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("caption.py: ") and done.stderr.count("\n") == 1


def test_the_script_without_its_files_or_with_wrong_arguments_exits_2(folder, tmp_path):
    (tmp_path / "caption.py").write_bytes((folder / "caption.py").read_bytes())
    done = script(tmp_path, "x.png")
    assert done.returncode == 2 and "config.json" in done.stderr and done.stderr.count("\n") == 1
    assert script(folder, "--beam", "0", "x.png").returncode == 2
    photo().save(tmp_path / "good.png")
    assert runtime.LONGEST == PREFIX_POSITION  # the script cannot ask the model
    done = script(folder, "--max-tokens", 65, tmp_path / "good.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "caption.py: max_tokens must be at most 64, not 65\n"
    assert script(folder, "--max-tokens", 64, tmp_path / "good.png").returncode == 0
    assert script(folder).returncode == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "encoder.onnx"])
def test_a_damaged_folder_is_refused_by_name(folder, tmp_path, name):
    for file in runtime.FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes()[: 40 if file == name else None])
    with pytest.raises(ValueError, match=name) as caught:
        runtime.Captioner(tmp_path, threads=1)
    assert "\n" not in str(caught.value)
