"""Pictures: enlarging, labelled grids, captions."""

import numpy as np
import pytest
import torch

from opd.formats.pictures import labelled_grid, to_pil, wrap


@pytest.mark.parametrize("pixels, side", [(1, 8), (8, 8), (9, 16), (120, 120)])
def test_to_pil_enlarges_by_whole_factors(pixels, side):
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    image = to_pil(x, pixels)
    assert image.size == (side, side)
    exact = (x.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(np.asarray(image), exact.repeat(side // 8, 0).repeat(side // 8, 1))


def test_labelled_grid_puts_every_image_in_its_place():
    g = torch.Generator().manual_seed(0)
    images = {name: list(torch.rand(3, 3, 8, 8, generator=g)) for name in ("base", "student")}
    grid = labelled_grid(images, ["a red circle", "two", "x" * 80], pixels=16)
    pixels = np.asarray(grid)
    tiles = [np.asarray(to_pil(image, 16)) for name in images for image in images[name]]
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16, 3))[:, :, 0]
    found = [np.argwhere((windows == tile).all((2, 3, 4))).tolist() for tile in tiles]
    assert all(len(places) == 1 for places in found)
    (y0, x0), *_ = [places[0] for places in found]
    pitch = 16 + 4
    assert [places[0] for places in found] == [
        [y0 + r * pitch, x0 + c * pitch] for r in range(2) for c in range(3)
    ]
    assert grid.size == (x0 + 3 * pitch, y0 + 2 * pitch)
    ink = (pixels < 128).all(2)
    assert (
        ink[:y0, x0 : x0 + 16].any() and ink[y0 : y0 + 16, :x0].any()
    )  # a caption above, a name to the left


def test_wrap_makes_three_lines_at_most():
    assert wrap("a red circle left of a blue square", 10) == "a red\ncircle\nleft of a"
    assert wrap("x" * 30, 10) == "x" * 10 and wrap("", 10) == ""
