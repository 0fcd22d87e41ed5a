"""Three images on which the features of judges are known, made by whole numbers alone."""

import torch
from torch import Tensor


def golden_images() -> Tensor:
    """A smooth gradient with a disc, a grid of rectangles, and noise over a diagonal edge, (3, 3, 32, 32) uint8."""
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    disc = (row - 13) ** 2 + (column - 19) ** 2 < 70
    gradient = torch.stack([60 + 5 * row, 220 - 4 * column, 40 + 2 * row + 3 * column])
    smooth = torch.where(disc, torch.tensor([200, 40, 90])[:, None, None], gradient)
    down, across = row // 6, column // 5
    grid = torch.stack([40 + 50 * (down % 4), 230 - 60 * (across % 3), 90 + 40 * ((down + across) % 3)])
    noise, state = [], 12345
    for _ in range(3 * 32 * 32):
        state = (1103515245 * state + 12345) % 2**31
        noise.append(state // 2**16 % 61)
    edge = torch.tensor(noise).reshape(3, 32, 32) + torch.where(row + 2 * column > 45, 150, 30)
    return torch.stack([smooth, grid, edge]).to(torch.uint8)
