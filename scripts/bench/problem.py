"""One piece of work for an operator: its inputs, our function, and a baseline that computes the same.

`forward` and `forward_backward` run either function in the same way, so that nothing but the function differs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What is computed, by whom, and how much of it there is.

    Args:
        ours: the operator with its settings bound; takes the inputs.
        baseline: another way to the same result, or None.
        baseline_name: what the baseline is, for the table.
        input_names: what the inputs are called.
        inputs: the tensors that both take.
        output_shape: shape of the result, None where it depends on the values.
        differentiable: positions of the inputs that get a gradient; none for an operator without one.
        read_by_backward: positions of the inputs that any backward pass must read again.
        num_units: how much work there is, in `unit`s.
        unit: what is counted: trilinear samples of one channel, boxes, or numbers.
        kink_positions: positions of the inputs whose gradient jumps, from voxel to voxel or behind a ReLU, so that
            rounding may put a few of its entries on the other side.
    """

    ours: Callable[..., Tensor]
    baseline: Callable[..., Tensor] | None
    baseline_name: str
    input_names: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    output_shape: tuple[int, ...] | None
    differentiable: tuple[int, ...]
    read_by_backward: tuple[int, ...]
    num_units: int
    unit: str
    kink_positions: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs[0].device

    def gradient_of_output(self) -> Tensor:
        """The gradient that a backward pass starts from, a draw of its own."""
        assert self.output_shape is not None
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.output_shape, generator=generator).to(self.inputs[0])


def forward(function: Callable[..., Tensor], problem: Problem) -> tuple[Tensor, ...]:
    """The output alone."""
    with torch.no_grad():
        return (function(*problem.inputs),)


def forward_backward(function: Callable[..., Tensor], problem: Problem, grad: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the differentiable inputs when `grad` [as the output] comes back."""
    inputs = [x.detach().requires_grad_(i in problem.differentiable) for i, x in enumerate(problem.inputs)]
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, [inputs[i] for i in problem.differentiable], grad)


def num_bytes(*tensors: Tensor) -> int:
    """Bytes that the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_to_move(problem: Problem, results: tuple[Tensor, ...]) -> int:
    """Least traffic: every input read once and every result written once.

    A backward pass also reads the gradient of the output, as large as the output, and the inputs it depends on.
    """
    moved = num_bytes(*problem.inputs, *results)
    if len(results) > 1:
        moved += num_bytes(results[0], *(problem.inputs[i] for i in problem.read_by_backward))
    return moved
