"""Draw random images."""

from __future__ import annotations

import numpy as np
import torch


def random_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Draw noise on slow waves, uint8 (b, h, w, 3): edges, ties and smooth parts."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 80 * np.sin(rows / 7.0)[..., None] + 40 * np.cos(columns / 5.0)[..., None]
    noise = rng.integers(0, 256, size=(count, height, width, 3))
    return torch.from_numpy(np.clip(noise * 0.6 + waves + 60, 0, 255).astype(np.uint8))
