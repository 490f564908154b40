"""Draws docs/canvas.jpg: what a run does, on a crop of a Landsat scene.

    python docs/draw_canvas.py SCENE.tif

Needs pillow, which comes with scikit-image.
"""

import sys
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image, ImageDraw
from rasterio.windows import Window

from pipeline.grid import Canvas
from pipeline.network import Nearest
from stablesr.aggregation import gaussian_window
from stablesr.box import Box
from stablesr.noise import START, noise
from stablesr.schedule import add_noise

SCALE, SHOWN = 4, 2
"""Of the run, and of the picture: target pixels a side of one drawn pixel."""

TIMES = (999, 360, 0)
"""Diffusion times of the three states."""

GAP = 16


def main(scene: str) -> None:
    with rasterio.open(scene) as dataset:
        source = dataset.read([1, 2, 3], window=Window(330, 250, 176, 160))
    network = Nearest(SCALE)
    image = torch.from_numpy(source).float() / 127.5 - 1.0
    # what is drawn at the end is the bicubic enlargement: it stands for the picture that a trained network makes
    enlarged = torch.nn.functional.interpolate(image[None], scale_factor=SCALE, mode="bicubic").clamp(-1, 1)
    unshuffled = torch.nn.functional.pixel_unshuffle(enlarged, 8)[0]
    canvas = Canvas(*image.shape[-2:], SCALE, 8, 32, 16, 128, 40)
    fresh = noise(0, 0, START, Box(0, 0, *unshuffled.shape[-2:]), len(unshuffled))
    panels = [_upright(np.clip(source.transpose(1, 2, 0) * 1.15, 0, 255), 1)]
    for time in TIMES:
        alpha_bar = float(network.schedule.alpha_bar[time])
        x = unshuffled if time == 0 else add_noise(unshuffled, fresh, alpha_bar)
        pixels = torch.nn.functional.pixel_shuffle(x[None], 8)[0].permute(1, 2, 0)
        panels.append(_upright(np.clip((pixels.numpy() + 1.0) * 127.5 * 1.15, 0, 255), SHOWN))
    _draw_tiles(panels[1], canvas)
    _draw_window(panels[2], canvas)
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    picture = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        picture.paste(panel, (left, (picture.height - panel.height) // 2))
        left += panel.width + GAP
    picture.save(Path(__file__).with_name("canvas.jpg"), quality=85, optimize=True)


def _upright(pixels: np.ndarray, shrink: int) -> Image.Image:
    panel = Image.fromarray(pixels.astype(np.uint8))
    return panel.resize((panel.width // shrink, panel.height // shrink), Image.Resampling.LANCZOS).convert("RGBA")


def _draw_tiles(panel: Image.Image, canvas: Canvas) -> None:
    """Every tile thin, one of them and its neighbour bold."""
    pen = ImageDraw.Draw(panel)
    for tile in canvas.tiles:
        pen.rectangle(_drawn(tile), outline=(255, 255, 255, 255))
    for tile in [*canvas.tiles][9:11]:
        pen.rectangle(_drawn(tile), outline=(255, 210, 0, 255), width=3)


def _draw_window(panel: Image.Image, canvas: Canvas) -> None:
    """The weights of one tile, and the blocks."""
    tile = [*canvas.tiles][9]
    left, top, right, bottom = _drawn(tile)
    weights = gaussian_window(canvas.tile, canvas.tile).numpy()
    opacity = Image.fromarray((np.clip(weights / weights.max(), 0, 1) * 190).astype(np.uint8))
    glow = Image.new("RGBA", (right - left, bottom - top), (255, 210, 0, 0))
    glow.putalpha(opacity.resize(glow.size, Image.Resampling.BILINEAR))
    panel.alpha_composite(glow, (left, top))
    pen = ImageDraw.Draw(panel)
    for index in canvas.blocks:
        pen.rectangle(_drawn(canvas.blocks.box(index)), outline=(255, 255, 255, 255), width=2)


def _drawn(latents: Box) -> tuple[int, int, int, int]:
    box = latents.scaled(8 // SHOWN)
    return box.left, box.top, box.right - 1, box.bottom - 1


if __name__ == "__main__":
    main(sys.argv[1])
