"""Draws scenes: anti-aliased shapes with texture, rim and shadow on a background, under varied light and noise.

Masks, textures and backgrounds are made once per size and kept; a picture then is a few products of small arrays.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from compress.data.scenes import Scene, Thing

PALETTE = {
    "red": (214, 30, 34),
    "orange": (250, 134, 10),
    "yellow": (250, 222, 40),
    "green": (28, 148, 52),
    "blue": (36, 78, 220),
    "purple": (132, 44, 176),
    "pink": (250, 130, 190),
    "brown": (116, 68, 30),
    "black": (22, 22, 24),
    "white": (246, 246, 244),
}
FINE = 4  # masks are drawn this many times larger and averaged down


def draw(scene: Scene, seed: int, size: int = 80) -> np.ndarray:
    """The picture of a scene: (size, size, 3) uint8 RGB.

    Light, noise and the stretch of background follow from the seed and the scene's number.
    """
    rng = random.Random(f"light {seed} {scene.number}")
    canvas = _stretch(rng, scene.background, size)
    for thing in reversed(scene.things):
        upright = rng.random() < 0.5
        for x, y, width in thing.spots:
            _paint(canvas, thing, x * size, y * size, max(6, round(width * size)), upright)
    bright, slope, angle = 0.82 + 0.3 * rng.random(), 0.2 * rng.random(), 2 * math.pi * rng.random()
    across, down = _planes(size)
    canvas *= (bright + slope * math.cos(angle) * across + slope * math.sin(angle) * down)[:, :, None]
    noise = _noise(size)
    top, left = int(rng.random() * size), int(rng.random() * size)
    canvas += np.float32(2 + 7 * rng.random()) * noise[top : top + size, left : left + size]
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _paint(canvas: np.ndarray, thing: Thing, x: float, y: float, width: int, upright: bool) -> None:
    """Lays one object on the canvas, (size, size, 3) float32 0..255, with a darker rim and a shadow."""
    cover, rim = _mask(thing.shape, width)
    base = np.asarray(PALETTE[thing.colour], np.float32)
    size = len(canvas)
    row, column = round(y - width / 2), round(x - width / 2)
    shade = max(1, size // 50)
    patch, part = _crop(canvas, row + shade, column + shade, width)
    patch *= 1 - 0.35 * cover[part][:, :, None]
    patch, part = _crop(canvas, row, column, width)
    cover, rim = cover[part][:, :, None], rim[part][:, :, None]
    if thing.texture == "plain":
        paint = base
    else:
        second = 0.22 * base + 0.78 * 255 if base.mean() < 140 else 0.38 * base
        if thing.colour == "black":
            second = np.asarray((150, 150, 150), np.float32)
        pattern = _texture(thing.texture, width, max(1.0, size / 80), upright)[part][:, :, None]
        paint = base + pattern * (second - base)
    paint = paint + rim * (0.45 * base - paint)
    patch += cover * (paint - patch)


def _crop(canvas: np.ndarray, row: int, column: int, width: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The part of the canvas under a patch at (row, column), and the part of the patch that lies on the canvas."""
    size = len(canvas)
    top, left, bottom, right = max(row, 0), max(column, 0), min(row + width, size), min(column + width, size)
    return canvas[top:bottom, left:right], (slice(top - row, bottom - row), slice(left - column, right - column))


@lru_cache(maxsize=1024)
def _mask(shape: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cover of a shape and of its rim: two (width, width) float32 arrays, 0..1."""
    big = FINE * width
    image = Image.new("L", (big, big))
    _outline(ImageDraw.Draw(image), shape, big - 1)
    full = np.asarray(image)
    # What is left when the edge is worn away by `reach` from all sides; padded, or nothing would wear at the border.
    reach = max(5, round(0.13 * width))
    inner = np.pad(full, reach)
    inner = np.minimum.reduce([inner[shift : shift + big] for shift in range(2 * reach + 1)])
    inner = np.minimum.reduce([inner[:, shift : shift + big] for shift in range(2 * reach + 1)])
    return _average(full), _average(full - inner)


def _average(fine: np.ndarray) -> np.ndarray:
    """Means over squares of FINE pixels: (w FINE, w FINE) uint8, 0..255, to (w, w) float32, 0..1."""
    width = len(fine) // FINE
    return fine.reshape(width, FINE, width, FINE).mean((1, 3), dtype=np.float32) / 255


def _outline(pen: ImageDraw.ImageDraw, shape: str, w: int) -> None:
    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [left * w, top * w, right * w, bottom * w]

    def turn(count: int, radii: tuple[float, ...], start: float, cy: float = 0.5) -> list[tuple[float, float]]:
        steps = [(radii[i % len(radii)], start + 2 * math.pi * i / count) for i in range(count)]
        return [((0.5 + r * math.cos(a)) * w, (cy + r * math.sin(a)) * w) for r, a in steps]

    def corners(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * w, y * w) for x, y in points]

    match shape:
        case "circle":
            pen.ellipse(box(0.02, 0.02, 0.98, 0.98), 255)
        case "square":
            pen.rectangle(box(0.07, 0.07, 0.93, 0.93), 255)
        case "triangle":
            pen.polygon(corners((0.5, 0.02), (0.99, 0.94), (0.01, 0.94)), 255)
        case "star":
            pen.polygon(turn(10, (0.52, 0.22), -math.pi / 2, cy=0.53), 255)
        case "ring":
            pen.ellipse(box(0.0, 0.0, 1.0, 1.0), 255)
            pen.ellipse(box(0.23, 0.23, 0.77, 0.77), 0)
        case "cross":
            pen.rectangle(box(0.34, 0.02, 0.66, 0.98), 255)
            pen.rectangle(box(0.02, 0.34, 0.98, 0.66), 255)
        case "diamond":
            pen.polygon(corners((0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)), 255)
        case "heart":
            pen.ellipse(box(0.01, 0.05, 0.53, 0.57), 255)
            pen.ellipse(box(0.47, 0.05, 0.99, 0.57), 255)
            pen.polygon(corners((0.05, 0.43), (0.5, 0.3), (0.95, 0.43), (0.5, 0.98)), 255)
        case "moon":
            pen.ellipse(box(0.04, 0.01, 1.02, 0.99), 255)
            pen.ellipse(box(0.4, -0.06, 1.3, 0.84), 0)
        case "arrow":
            pen.polygon(
                corners((0.0, 0.35), (0.5, 0.35), (0.5, 0.08), (1.0, 0.5), (0.5, 0.92), (0.5, 0.65), (0.0, 0.65)), 255
            )
        case "flower":
            for x, y in turn(6, (0.31,), -math.pi / 2):
                pen.ellipse([x - 0.185 * w, y - 0.185 * w, x + 0.185 * w, y + 0.185 * w], 255)
            pen.ellipse(box(0.38, 0.38, 0.62, 0.62), 0)
        case "house":
            pen.polygon(corners((0.5, 0.0), (1.0, 0.45), (0.0, 0.45)), 255)
            pen.rectangle(box(0.12, 0.42, 0.88, 0.98), 255)
            pen.rectangle(box(0.4, 0.66, 0.6, 0.99), 0)


@lru_cache(maxsize=1024)
def _texture(texture: str, width: int, unit: float, upright: bool) -> np.ndarray:
    """Share of the second colour: (width, width) float32, 0..1. `unit` is a pixel of an 80 pixel picture."""
    fine = (np.arange(FINE * width, dtype=np.float32) + 0.5) / FINE / unit
    period = min(max(5.0, width / unit / 5), 7.0)
    across, down = np.meshgrid(fine, fine)
    if texture == "striped":
        on = ((across if upright else down) % period) > 0.58 * period
    elif texture == "checkered":
        cell = max(4.0, 0.75 * period)
        on = (np.floor(across / cell) + np.floor(down / cell)) % 2 > 0
    else:
        shift = (np.floor(down / period) % 2) * period / 2
        dx, dy = (across + shift) % period - period / 2, down % period - period / 2
        on = dx**2 + dy**2 < (0.34 * period) ** 2
    return on.reshape(width, FINE, width, FINE).mean((1, 3), dtype=np.float32)


@lru_cache(maxsize=8)
def _planes(size: int) -> tuple[np.ndarray, np.ndarray]:
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return np.broadcast_to(line[None], (size, size)), np.broadcast_to(line[:, None], (size, size))


@lru_cache(maxsize=8)
def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2 * size, 2 * size, 3), dtype=np.float32)


def _stretch(rng: random.Random, background: str, size: int) -> np.ndarray:
    """A fresh (size, size, 3) float32 piece of the background, sometimes mirrored."""
    tile = _backdrop(background, size)
    top, left = int(rng.random() * (len(tile) - size)), int(rng.random() * (tile.shape[1] - size))
    piece = tile[top : top + size, left : left + size]
    return (piece[:, ::-1] if rng.random() < 0.5 else piece).copy()


@lru_cache(maxsize=64)
def _backdrop(background: str, size: int) -> np.ndarray:
    """A wide tile of background: (1.25 size, 2.5 size, 3) float32, 0..255."""
    rng = np.random.default_rng(list(background.encode()))
    height, width = size + size // 4, 2 * size + size // 2
    unit = size / 80
    down, across = np.mgrid[0:height, 0:width].astype(np.float32) / unit
    tall = height / unit

    def blend(top: tuple, bottom: tuple, share: np.ndarray) -> np.ndarray:
        top, bottom = np.asarray(top, np.float32), np.asarray(bottom, np.float32)
        return top + share[:, :, None] * (bottom - top)

    def blur(cell: float) -> np.ndarray:
        """Smooth noise, 0..1, with grains of `cell` pixels."""
        shape = max(2, int(width / unit / cell)), max(2, int(height / unit / cell))
        grains = Image.fromarray(rng.integers(0, 256, shape[::-1], dtype=np.uint8))
        return np.asarray(grains.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255

    match background:
        case "sky":
            clouds = np.clip((blur(16) + 0.4 * blur(7)) * 2.2 - 1.9, 0, 1) * 0.8
            tile = blend((96, 170, 240), (186, 220, 250), down / tall)
            tile += clouds[:, :, None] * (250 - tile)
        case "grass":
            blades = 0.6 * blur(1.6) + 0.4 * blur(9)
            tile = blend((52, 112, 36), (150, 200, 84), blades)
        case "sand":
            waves = 0.5 + 0.25 * np.sin(down / 3.2 + 2.5 * blur(14) * np.pi) + 0.25 * (blur(1.5) - 0.5)
            tile = blend((206, 176, 118), (240, 218, 166), waves)
        case "night":
            tile = blend((10, 12, 44), (34, 34, 84), down / tall)
            radius = max(1, round(0.5 * unit))
            for _ in range(90):
                row, column = int(rng.integers(height)), int(rng.integers(width))
                tile[row : row + radius, column : column + radius] = 130 + 120 * rng.random()
        case "brick":
            course = np.floor(down / 8)
            shift = (course % 2) * 8
            mortar = (down % 8 < 1.2) | ((across + shift) % 16 < 1.2)
            rows, columns = course.astype(int) % 64, ((across + shift) // 16).astype(int) % 64
            tint = rng.random((64, 64), dtype=np.float32)[rows, columns]
            tile = blend((148, 68, 52), (184, 98, 74), 0.7 * tint + 0.3 * blur(2))
            tile[mortar] = (206, 196, 184)
        case "wood":
            grain = 0.5 + 0.5 * np.sin(0.9 * (down % 20) + 5 * blur(22) * np.pi)
            tile = blend((160, 112, 66), (190, 140, 90), 0.75 * grain + 0.25 * blur(2))
            tile[(down % 20) < 1.2] = (96, 62, 34)
        case "water":
            ripples = np.clip(0.5 + 0.5 * np.sin(down / 2.2 + 3 * np.sin(across / 9 + 4 * blur(18))), 0, 1) ** 3
            tile = blend((34, 120, 160), (120, 204, 214), 0.7 * ripples + 0.2 * blur(3))
        case "snow":
            tile = blend((206, 218, 236), (250, 251, 255), 0.75 * blur(12) + 0.25 * blur(1.5))
        case "sunset":
            share = down / tall
            tile = blend((112, 62, 140), (252, 150, 70), np.clip(share * 1.25, 0, 1))
            tile += (np.clip(blur(15) * 2 - 1.2, 0, 1) * np.exp(-8 * (share - 0.5) ** 2))[:, :, None] * (60, 30, 20)
        case _:
            tile = blend((128, 130, 134), (176, 178, 182), 0.6 * down / tall + 0.4 * blur(20))
    # Whole numbers, so that machines whose sines differ in the last bit draw the same.
    return np.round(tile).astype(np.float32)
