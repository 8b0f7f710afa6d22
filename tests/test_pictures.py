"""Pictures: enlarging. What a labelled grid holds is tested with sample.py, which makes one."""

import numpy as np
import torch

from opd.formats.pictures import to_pil


def test_to_pil_enlarges_by_whole_factors():
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    exact = (x.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    for pixels, factor in ((1, 1), (9, 2), (120, 15)):
        assert np.array_equal(np.asarray(to_pil(x, pixels)), exact.repeat(factor, 0).repeat(factor, 1))
