"""The exported captioner: an image in, a sentence out, on numpy, Pillow, tokenizers and onnxruntime alone.

This file is self-contained. Every export carries a copy of it as `caption.py`, which is a program too:

    python caption.py [--beam N] [--max-tokens N] [--threads N] [--json] PHOTO...

Its folder holds `encoder.onnx` (pixels -> grid), `prefix.onnx` (grid -> keys and values), `decoder.onnx` (those and a token -> logits), the
weights of those two in `decoder.onnx.data`, `config.json`, `tokenizer.json`, `preprocessor_config.json` and, where the model reads
concepts, `concepts.onnx` (grid -> word pieces of what it shows). Float and INT8 graphs have the same inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __name__ == "__main__":  # numpy's multiplication of matrices is not used: its threads would only be started
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

NEVER = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")  # pieces that a caption cannot hold
SETTINGS = ("config.json", "tokenizer.json", "preprocessor_config.json")
GRAPHS = ("encoder.onnx", "prefix.onnx", "decoder.onnx", "decoder.onnx.data")
FILES = (*SETTINGS, *GRAPHS)
# A large JPEG is decoded at a part of its size, with sides of at least this many times the encoder's: pixels differ by 2 of 255 at most.
OVERSAMPLED = 4
LONGEST = 64  # pieces of a caption that the model has places for
CPUINFO = Path("/proc/cpuinfo")


def open_photo(path: str | Path, least: int | None = None) -> Image.Image:
    """A file -> an RGB PIL image, decoded and turned upright by its EXIF orientation. ValueError, one line, where it is no whole image.
    `least`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, while both sides keep at least that many pixels."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if least is not None:
                image.draft(None, (least, least))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return flat(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except Exception as error:
        raise ValueError(f"{path}: not a readable image ({' '.join(str(error).split()) or type(error).__name__})") from None


def flat(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB, itself if it is so already. What is transparent becomes white; 16-bit grey is scaled to 8."""
    from PIL import Image

    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide >> 8 if wide.max(initial=0) > 255 else wide).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def squash(image, settings: dict) -> np.ndarray:
    """A PIL image or (H, W, 3) uint8 -> (S, S, 3) uint8, by preprocessor_config.json: squashed to a square by bicubic interpolation; one
    that is S x S already is not resampled."""
    from PIL import Image

    asked = settings.get("resize", "squash"), settings.get("interpolation", "bicubic")
    if asked != ("squash", "bicubic"):
        raise ValueError(f"preprocessor_config.json: resize and interpolation are {asked}; only ('squash', 'bicubic') are known here")
    size = (settings["image_size"],) * 2
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image must be (height, width, 3) uint8, this one is {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    image = flat(image)  # a photo's pixels are not copied on the way: of 12 megapixels each copy takes 36 MB or 48
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def pixels(image, settings: dict) -> np.ndarray:
    """A PIL image or (H, W, 3) uint8 -> (3, S, S) float32: squashed, then (x / 255 - mean) / std. Training squashes by it too."""
    mean, std = (np.asarray(settings[key], np.float32)[:, None, None] for key in ("mean", "std"))
    planes = np.ascontiguousarray(squash(image, settings).transpose(2, 0, 1)).astype(np.float32)
    planes /= 255  # each on whole planes and in place: an eighth of the time that three channels side by side take
    planes -= mean
    planes /= std
    return planes


class Past(NamedTuple):
    """Keys and values, layer by layer, a row for each caption, each (N, heads, length, head width): of its prefix, and of itself so far."""

    prefix: list[np.ndarray]
    own: list[np.ndarray]

    def rows(self, captions: list[int], same_images: bool) -> Past:
        """Those `captions` alone, in their order. Where they are of the same images as before, no prefix is copied."""
        return Past(self.prefix if same_images else [array[captions] for array in self.prefix], [array[captions] for array in self.own])


class Captioner:
    """The captioner in `folder`. `threads` per graph; None: as many as this process may use. FileNotFoundError or ValueError, one line,
    where the folder is not a whole exported captioner."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        from tokenizers import Tokenizer

        self.folder = folder = Path(folder)
        reads_concepts = (folder / FILES[0]).is_file() and read_json(folder / FILES[0]).get("concepts")
        for name in (*FILES, *(["concepts.onnx"] if reads_concepts else [])):
            if not (folder / name).is_file():
                if name == "prefix.onnx" and (folder / "decoder.onnx").is_file():
                    raise FileNotFoundError(f"{folder}: made by an earlier lightcap; make it anew (lightcap run, lightcap export)")
                raise FileNotFoundError(f"{folder}: no {name} there, so it is not an exported captioner")
        self.threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self.config, self.settings = read_json(folder / "config.json"), read_preprocessing(folder / "preprocessor_config.json")
        self.mask_piece = self.config.get("mask_piece")
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from None
        self.start, self.end = (self.tokenizer.token_to_id(piece) for piece in ("[CLS]", "[SEP]"))
        self.never = [i for i in map(self.tokenizer.token_to_id, NEVER) if i is not None]
        quantized = self.config.get("quantized") or {}
        saturates = not quantized.get("reduce_range", False) and without_vnni(CPUINFO)
        options = session_options(self.threads, saturates)
        model = unsigned(folder / "encoder.onnx") if quantized and saturates else None
        self.encoder = open_session(folder / "encoder.onnx", session_options(self.threads, False) if model else options, model)
        self.prefix, self.decoder = (open_session(folder / name, options) for name in ("prefix.onnx", "decoder.onnx"))
        self.extractor = open_session(folder / "concepts.onnx", options) if reads_concepts else None
        side, size = self.encoder.get_inputs()[0].shape[-1], self.settings["image_size"]
        if isinstance(side, int) and side != size:
            raise ValueError(f"{folder / 'preprocessor_config.json'}: image_size is {size}, but encoder.onnx reads {side} x {side} pixels")
        inputs = self.decoder.get_inputs()
        self.past_names = [item.name for item in inputs if item.name.startswith(("prefix_", "past_"))]
        self.sizes = [(item.shape[1], item.shape[3]) for item in inputs if item.name.startswith("past_")]  # by layer: heads, their width

    def open(self, path: str | Path) -> Image.Image:
        """A photo's file, with no more pixels than are needed to squash it. ValueError, one line, where it is no whole image."""
        return open_photo(path, OVERSAMPLED * self.settings["image_size"])

    def encode(self, batch: np.ndarray) -> np.ndarray:
        """Pixels (B, 3, S, S) -> grid (B, G, channels)."""
        return self.encoder.run(None, {"pixels": np.ascontiguousarray(batch, np.float32)})[0]

    def prefill(self, grid: np.ndarray) -> Past:
        """grid (B, G, channels) -> the prefix's keys and values."""
        feeds = {"grid": np.ascontiguousarray(grid, np.float32)}
        if self.extractor:
            feeds["concepts"] = self.extractor.run(None, feeds)[0]
        return Past(self.prefix.run(None, feeds), [np.zeros((len(grid), heads, 0, width), np.float32) for heads, width in self.sizes])

    def step(self, tokens: np.ndarray, position: int, past: Past) -> tuple[np.ndarray, Past]:
        """tokens (N,) at `position` -> logits (N, V), and keys and values with this token's own."""
        tokens = np.asarray(tokens, np.int64)[:, None]
        places = np.full_like(tokens, position)
        if self.mask_piece is not None:  # the model predicts the piece under a [MASK] behind the token
            tokens = np.concatenate([tokens, np.full_like(tokens, self.mask_piece)], 1)
            places = np.concatenate([places, places + 1], 1)
        feeds = dict(zip(self.past_names, past.prefix + past.own, strict=True))
        logits, *own = self.decoder.run(None, feeds | {"tokens": tokens, "positions": places})
        if self.mask_piece is not None:
            own = [array[:, :, :-1] for array in own]
        return logits[:, -1], Past(past.prefix, own)

    def decode(self, grid: np.ndarray, beam: int = 1, max_tokens: int | None = None) -> list[tuple[str, float]]:
        """grid (B, G, channels) -> (caption, sum of its log-probabilities) per image. ValueError for more pieces than there are places."""
        max_tokens = max_tokens or self.config.get("max_tokens", 20)
        longest = LONGEST if self.mask_piece is None else LONGEST - 1  # a [MASK] stands behind the last piece
        if max_tokens > longest:
            raise ValueError(f"max_tokens must be at most {longest}, not {max_tokens}")
        found = self.search(grid, beam, max_tokens)
        return [(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), logprob) for ids, logprob in found]

    def search(self, grid: np.ndarray, beam: int, max_tokens: int) -> list[tuple[list[int], float]]:
        """Beam search (beam 1 is greedy) -> per image the pieces between [CLS] and [SEP], and their log-probability with [SEP]'s.

        Each step looks at an image's 2 x beam best continuations: those that end and rank among the first `beam` are finished, and the
        `beam` best that do not end go on. A finished caption's score is its log-probability per piece, [SEP] included; the search ends
        with `beam` finished captions or at `max_tokens` pieces. Equal scores go to the earlier beam, then to the lower id.
        """
        if beam < 1 or max_tokens < 1:
            raise ValueError(f"beam and max_tokens must be at least 1, not {beam} and {max_tokens}")
        live = [(image, 0.0, [self.start]) for image in range(len(grid))]
        finished: list[list[tuple[float, float, list[int]]]] = [[] for _ in range(len(grid))]
        past = self.prefill(grid)
        for position in range(max_tokens):
            logits, past = self.step([ids[-1] for _, _, ids in live], position, past)
            scores = logits - logits.max(-1, keepdims=True)
            scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
            scores[:, self.never] = -np.inf
            scores += np.array([[score] for _, score, _ in live], np.float32)
            following, sources = [], []
            for image in dict.fromkeys(image for image, _, _ in live):
                rows = [row for row, item in enumerate(live) if item[0] == image]
                kept = []
                for rank, (place, score) in enumerate(best(scores[rows].ravel(), 2 * beam)):
                    row, piece = rows[place // scores.shape[1]], place % scores.shape[1]
                    ids = [*live[row][2], piece]
                    if piece != self.end:
                        kept.append((row, (image, score, ids)))
                    elif rank < beam:
                        finished[image].append((score / (position + 1), score, ids[:-1]))
                if len(finished[image]) < beam:
                    sources += [row for row, _ in kept[:beam]]
                    following += [item for _, item in kept[:beam]]
            images, live = [image for image, _, _ in live], following
            if not live:
                break
            if sources != list(range(len(images))):
                past = past.rows(sources, [images[row] for row in sources] == images)
        for image, score, ids in live:
            finished[image].append((score / max_tokens, score, ids))
        if not all(finished):
            raise ValueError(f"{self.folder}: what its graphs compute are no numbers: the files are damaged; copy them again")
        return [(ids[1:], score) for _, score, ids in (max(found, key=lambda item: item[0]) for found in finished)]

    def captions(self, images: np.ndarray | Iterable, beam: int = 1, max_tokens: int | None = None) -> list[tuple[str, float]]:
        """(caption, log-probability) of each image: a pixel batch (B, 3, S, S) float32, or files, PIL images and uint8 arrays."""
        if not (isinstance(images, np.ndarray) and images.dtype == np.float32):
            images = np.stack([pixels(self.open(one) if isinstance(one, str | Path) else one, self.settings) for one in images])
        return self.decode(self.encode(images), beam, max_tokens)

    def caption(self, image, beam: int = 1, max_tokens: int | None = None) -> tuple[str, float]:
        """(caption, log-probability) of one image: a file, a PIL image or (H, W, 3) uint8."""
        return self.captions([image], beam, max_tokens)[0]


def best(scores: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The `count` highest finite entries as (index, score), best first, the lower index first among equals."""
    count = min(count, len(scores))
    bound = np.partition(scores, len(scores) - count)[len(scores) - count]
    places = np.flatnonzero((scores >= bound) & np.isfinite(scores))
    order = places[np.argsort(-scores[places], kind="stable")][:count]
    return [(int(place), float(scores[place])) for place in order]


def session_options(threads: int, saturates: bool | None = None):
    """ONNX Runtime's: `threads` threads, operators one after the other, INT8 sums exact.

    x86 processors without VNNI have two ways to multiply uint8 by int8: one adds two products in 16 bits. Where it `saturates` (None: on
    them; never by weights of 7 bits), the slower one is taken. With VNNI the fast way is exact, and the option would take it away.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode, options.log_severity_level = onnxruntime.ExecutionMode.ORT_SEQUENTIAL, 4
    if without_vnni(CPUINFO) if saturates is None else saturates:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def open_session(path: Path, options, model: bytes | None = None):
    """An ONNX Runtime session of the file, or of `model` in its place, with `session_options`."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]}); copy it again, or make it anew") from None
    session._model_bytes = None  # its copy of the model, which only a change of providers would read
    return session


def unsigned(path: Path) -> bytes | None:
    """An ONNX model with int8 weights above 64, and their zero points, as uint8 and 128 higher: the same numbers, whose sums are exact.
    ONNX Runtime, asked by `session_options`, does so too, but slowly: a cold start takes longer (docs/speed.md). None for a file in which
    any int8 tensor is more than a weight, or its zero point, of one DequantizeLinear."""
    data, seen = bytearray(path.read_bytes()), set()
    try:  # by onnx.proto: 7 is a model's graph, 1 its nodes and 5 its tensors; 2 is a tensor's type, of which INT8 is 3 and UINT8 is 2
        [graph] = [place for field, place in fields(data, 0, len(data)) if field == 7]
        tensors = [dict(fields(data, *place)) for field, place in fields(data, *graph) if field == 5]
        tensors = {bytes(data[slice(*tensor[8])]): tensor for tensor in tensors if data[tensor[2][0]] == 3}
        values = {name: np.frombuffer(data, np.int8)[slice(*tensor[9])] for name, tensor in tensors.items()}
        for node in (place for field, place in fields(data, *graph) if field == 1):
            parts = [(field, bytes(data[slice(*place)])) for field, place in fields(data, *node) if field in (1, 4)]  # inputs, operator
            names = [name for field, name in parts if field == 1 and name in values]
            if names and (len(names) != 2 or (4, b"DequantizeLinear") not in parts or seen.intersection(names)):
                return None
            seen.update(names)
            if names and ((values[names[0]] + 64).view(np.uint8) > 128).any():  # int8 wraps around
                for name in names:
                    data[tensors[name][2][0]] = 2
                    values[name] ^= -128
    except (IndexError, KeyError, ValueError, RecursionError):
        return None
    return bytes(data) if seen else None


def fields(data: bytearray, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Of the protobuf message in data[start:end], without values of fixed size: each field's number, and where its value is."""
    while start < end:
        key, begin = varint(data, start)
        value, start = varint(data, begin)
        if key & 7 == 2:  # behind its length
            begin, start = start, start + value
        yield key >> 3, (begin, start)


def varint(data: bytearray, place: int) -> tuple[int, int]:
    """A protobuf integer, seven bits in a byte, and the place behind it."""
    higher, end = varint(data, place + 1) if data[place] > 127 else (0, place + 1)
    return data[place] & 127 | higher << 7, end


def without_vnni(cpuinfo: Path) -> bool:
    """Whether this is an x86 processor without VNNI, or one whose system does not say (Windows, macOS): slower is better than wrong."""
    if not cpuinfo.is_file():
        return platform.machine().lower() in ("x86_64", "amd64")
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() == "flags"), [])  # ARM says "Features"
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"}.intersection(flags)  # whose sums are exact


def read_json(path: Path) -> dict:
    """A JSON object. ValueError, one line, for another file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def read_preprocessing(path: Path) -> dict:
    """preprocessor_config.json. ValueError, one line, where it does not say a size, and a mean and a deviation of each channel."""
    values = read_json(path)
    size = values.get("image_size")
    numbers = [[type(x) in (int, float) for x in values[key]] if isinstance(values.get(key), list) else [] for key in ("mean", "std")]
    if type(size) is not int or size < 1 or numbers != [[True] * 3] * 2:
        raise ValueError(f"{path}: needs image_size, pixels, and mean and std, three numbers each")
    return values


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where an image could not be read, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="caption.py", description="Captions photos with the model in this folder.")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--beam", type=positive, default=1, metavar="N", help="hypotheses kept at each step (default 1, greedy)")
    parser.add_argument("--max-tokens", type=positive, default=None, metavar="N", help="longest caption, in word pieces")
    parser.add_argument("--threads", type=positive, default=None, metavar="N", help="processor threads (default: all there are)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    options = parser.parse_args(arguments)
    try:
        import PIL.Image  # noqa: F401  where it is absent, that is said once
        captioner = Captioner(Path(__file__).resolve().parent, options.threads)
    except (OSError, ValueError, ImportError) as error:
        print(f"caption.py: {error}", file=sys.stderr)
        return 2
    rows = []
    for photo in options.photos:
        try:
            image = captioner.open(photo)
        except ValueError as error:
            rows.append({"image": photo, "error": str(error)})
            print(f"caption.py: {error}", file=sys.stderr)
            continue
        began = time.perf_counter()
        try:  # a photo's pixels are not kept beside the next one's
            text, logprob = captioner.caption(image := squash(image, captioner.settings), options.beam, options.max_tokens)
        except ValueError as error:
            print(f"caption.py: {error}", file=sys.stderr)
            return 2
        rows.append({"image": photo, "caption": text, "logprob": logprob, "ms": (time.perf_counter() - began) * 1000})
        if not options.json:
            print(f"{photo}\t{text}")
    if options.json:
        strange = any("\ud800" <= letter <= "\udfff" for letter in "".join(options.photos))  # of a file's name that is no UTF-8
        print(json.dumps(rows, indent=1, ensure_ascii=strange))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")  # a file's name that is no UTF-8 is printed as it is
    try:
        status = main()
        sys.stdout.flush()
    except OSError as error:  # of what reads the captions: a full disk, or `head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0 if isinstance(error, BrokenPipeError) else f"caption.py: {error}"  # a text is printed, and is status 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
