"""Random subsets of matched boxes with a fixed share of foreground."""

import torch
from torch import Tensor

from seg3d_monai.matching.iou_matcher import BACKGROUND


@torch.no_grad()
def sample_balanced(matched: Tensor, num_samples: int, foreground_fraction: float) -> tuple[Tensor, Tensor]:
    """Sample foreground and background rows, uniformly, without replacement (torch's global generator).

    Args:
        matched: int64 [M] of an IoUMatcher.
        num_samples: rows wanted in all; background fills up what foreground leaves.
        foreground_fraction: largest share of foreground rows.

    Returns:
        Indices of foreground rows [P] and of background rows [B], each ascending.
    """
    foreground = (matched >= 0).nonzero().squeeze(1)
    background = (matched == BACKGROUND).nonzero().squeeze(1)
    num_foreground = min(len(foreground), int(num_samples * foreground_fraction))
    num_background = min(len(background), num_samples - num_foreground)
    return _draw(foreground, num_foreground), _draw(background, num_background)


def _draw(rows: Tensor, count: int) -> Tensor:
    chosen = torch.randperm(len(rows), device=rows.device)[:count]
    return rows[chosen.sort().values]
