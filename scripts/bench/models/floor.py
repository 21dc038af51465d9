"""The floor of a training step: the kernels of its convolutions, linear layers and attention, run alone.

`record` runs a network forward and backward once and keeps every such kernel call that PyTorch's dispatcher sees, in
the backward pass too, with the very tensors that it got: shapes, strides, dtypes, values, and which gradients were
asked for. What is shared in the step (a weight, or an input that forward and backward both read) is shared here; all
else has its own memory, so that no call finds its inputs in the cache because the one before it read them. `replay`
runs the calls again and drops each result at once.

Nothing else is in the floor: not the casts of autocast, the sums that give a bias its gradient, norms, activations,
RoIAlign, NMS, and nothing of the criterion, whose own backward pass runs unrecorded.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.timing import synchronise

KINDS = ("convolution", "linear", "attention", "batched product")
"""Kinds of calls. Batched products are linear layers on maps with the channels first, and the networks' own products of
queries with mask features, which make the masks of masked attention (Mask2Former) and first boxes (Mask DINO)."""

KIND_OF = {
    "aten::convolution": "convolution",
    "aten::convolution_backward": "convolution",
    "aten::mm": "linear",
    "aten::addmm": "linear",
    "aten::bmm": "batched product",
    "aten::baddbmm": "batched product",
    "seg3d::ms_deform_attn3d": "attention",
    "seg3d::ms_deform_attn3d_backward": "attention",
}
FUSED_ATTENTION = "aten::_scaled_dot_product_"
"""How the names of PyTorch's attention kernels begin, forward and backward, on every device."""


@dataclass(frozen=True)
class Call:
    """One call of a kernel."""

    kind: str
    function: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Namespace and name, as aten::mm."""
        return str(self.function._schema.name)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors among the arguments, in order."""
        return [tuple(argument.shape) for argument in self.args if isinstance(argument, Tensor)]

    def run(self) -> Any:
        """Call it again on the same tensors."""
        return self.function(*self.args, **self.kwargs)


def kind_of(name: str) -> str | None:
    """The kind of a kernel by its name; None where it is not in the floor."""
    return "attention" if name.startswith(FUSED_ATTENTION) else KIND_OF.get(name)


class Recorder(TorchDispatchMode):
    """While it is active, keeps the calls that belong to the floor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call, and keep it if it is of the floor. Aliases are kept, so that the graph can go."""
        kwargs = dict(kwargs or {})
        kind = kind_of(function._schema.name)
        if kind is not None:
            kept_args, kept_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            self.calls.append(Call(kind, function, kept_args, kept_kwargs))
        return function(*args, **kwargs)


def record(network: Callable[[], Any], criterion: Callable[[Any], Tensor]) -> list[Call]:
    """The floor's calls of one forward and backward pass, in order; gradients are left in the parameters.

    Args:
        network: gives the outputs, tensors in dicts, lists and tuples.
        criterion: outputs -> scalar. Its forward and backward passes are not recorded: the backward pass goes from the
            loss to the outputs first, then, recorded, from there on.
    """
    recorder = Recorder()
    with recorder:
        outputs = network()
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def cut(output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        if id(output) not in leaves:
            leaves[id(output)] = (output, output.detach().requires_grad_())
        return leaves[id(output)][1]

    loss = criterion(tree_map_only(Tensor, cut, outputs))
    ends = list(leaves.values())
    grads = torch.autograd.grad(loss, [leaf for _, leaf in ends], allow_unused=True)
    reached = [(output, grad) for (output, _), grad in zip(ends, grads, strict=True) if grad is not None]
    # In this thread, also on CUDA: a dispatch mode sees its own thread only.
    with torch.autograd.set_multithreading_enabled(False), recorder:
        torch.autograd.backward([output for output, _ in reached], [grad for _, grad in reached])
    return recorder.calls


@torch.no_grad()
def replay(calls: Sequence[Call], device: torch.device) -> dict[str, float]:
    """Seconds of each kind's calls, kind after kind, in the order of the recording."""
    seconds = {}
    for kind in KINDS:
        of_kind = [call for call in calls if call.kind == kind]
        synchronise(device)
        start = time.perf_counter()
        for call in of_kind:
            call.run()
        synchronise(device)
        seconds[kind] = time.perf_counter() - start
    return seconds
