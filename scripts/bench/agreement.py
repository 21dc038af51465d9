"""Whether two results are the same, up to rounding: a comparison of times means nothing between things that differ."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.problem import Problem

TOLERANCE = 1e-4
"""Largest difference, of the largest value of the same tensor: float32 sums over thousands of samples."""
HALF_TOLERANCE = 2**-7
"""The same between float32 and bfloat16, which keeps 8 bits of a result and of the gradient that comes in."""
KINK_SHARE = 1e-4
"""Share of a gradient's entries that may differ freely where the gradient jumps from one voxel to the next."""


@dataclass(frozen=True)
class Agreement:
    """The verdict, and the words to show."""

    agrees: bool
    words: str

    def as_json(self) -> dict[str, bool | str]:
        """The fields."""
        return asdict(self)


def compare(
    ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], problem: Problem, tolerance: float = TOLERANCE
) -> Agreement:
    """Compare an output, and the gradients of the differentiable inputs if there are any."""
    if ours[0].dtype == torch.int64:
        is_same = torch.equal(ours[0], theirs[0])
        if is_same:
            return Agreement(True, f"the same {len(ours[0])} boxes in the same order")
        is_same = torch.equal(ours[0].sort().values, theirs[0].sort().values)
        counts = f"{len(ours[0])} and {len(theirs[0])} boxes kept"
        return Agreement(is_same, f"the same {len(ours[0])} boxes, ordered differently" if is_same else counts)
    agrees, words = True, []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        position = problem.differentiable[number - 1] if number else None
        share = KINK_SHARE if position in problem.kink_positions else 0.0
        name = "output" if position is None else f"gradient of {problem.input_names[position]}"
        is_close, text = _compare_tensors(mine.float(), other.float(), tolerance, share)
        agrees = agrees and is_close
        words.append(f"{name}: {text}")
    return Agreement(agrees, "; ".join(words))


def _compare_tensors(mine: Tensor, other: Tensor, tolerance: float, free_share: float) -> tuple[bool, str]:
    """Compare up to `tolerance` of the largest value, but for a share of entries that may differ."""
    if mine.shape != other.shape or not bool(torch.isfinite(mine).all()):
        return False, f"shapes {tuple(mine.shape)} and {tuple(other.shape)}, or values that are not finite"
    difference = (mine - other).abs()
    largest = float(other.abs().max()) or 1.0
    worst = float(difference.max()) / largest
    if worst <= tolerance:
        return True, f"differ by {worst:.0e} of the largest value"
    share = int((difference > tolerance * largest).sum()) / difference.numel()
    return share <= free_share, f"{share:.0e} of the entries differ, by up to {worst:.0e} of the largest value"
