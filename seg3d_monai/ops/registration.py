"""Bind the operators to PyTorch when this module is imported: schemas, kernels, fake kernels, autograd.

The compiled libraries bring the kernels of their devices, and the CPU's also the schemas. ops/reference.py serves every
other device, or all of them if there is no library. The first call on CUDA loads the CUDA kernels, which then take its
place, but for the operators that have none (`PLAIN_ON_CUDA`).
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seg3d_monai.ops import reference
from seg3d_monai.ops.loading import Loaded, load_cuda_operators, load_operators
from seg3d_monai.ops.schemas import NAMESPACE, SCHEMAS

REFERENCE_KERNELS: dict[str, Callable[..., Any]] = {
    "roi_align3d": reference.roi_align3d,
    "roi_align3d_backward": reference.roi_align3d_backward,
    "ms_deform_attn3d": reference.ms_deform_attn3d,
    "ms_deform_attn3d_backward": reference.ms_deform_attn3d_backward,
    "nms3d": reference.nms3d,
    "batched_nms3d": reference.batched_nms3d,
    "match_boxes3d": reference.match_boxes3d,
    "mask_targets3d": reference.mask_targets3d,
    "paste_masks3d": reference.paste_masks3d,
    "label_pairs": reference.label_pairs,
    "label_extents": reference.label_extents,
    "layer_norm": reference.layer_norm,
    "layer_norm_backward": reference.layer_norm_backward,
    "group_norm": reference.group_norm,
    "group_norm_backward": reference.group_norm_backward,
}
PUBLIC = (
    "roi_align3d",
    "nms3d",
    "batched_nms3d",
    "match_boxes3d",
    "mask_targets3d",
    "paste_masks3d",
    "label_pairs",
    "label_extents",
    "ms_deform_attn3d",
    "layer_norm",
    "group_norm",
)
PLAIN_ON_CUDA = (
    "match_boxes3d",
    "mask_targets3d",
    "paste_masks3d",
    "label_pairs",
    "label_extents",
    "layer_norm",
    "layer_norm_backward",
    "group_norm",
    "group_norm_backward",
)
"""Operators without a CUDA kernel of ours: torch's own ones, which the reference calls, are good there."""


def _on_other_devices(name: str) -> Callable[..., Any]:
    """The kernel of a device that has no compiled one yet."""

    if name in PLAIN_ON_CUDA:
        return REFERENCE_KERNELS[name]

    def kernel(*arguments: Any) -> Any:
        is_on_cuda = any(isinstance(argument, Tensor) and argument.is_cuda for argument in arguments)
        if is_on_cuda and load_cuda_operators().path == "compiled":
            return getattr(torch.ops.seg3d, name)(*arguments)
        return REFERENCE_KERNELS[name](*arguments)

    return kernel


LOADED = load_operators()
# Registrations live as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if LOADED.path == "reference":
        _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _on_other_devices(_name), "CompositeExplicitAutograd")


def status() -> list[dict[str, str | None]]:
    """How each operator runs in this process on the CPU, and on CUDA if there is a GPU, for `seg3d doctor`.

    Returns:
        One dict per operator and device: op, device ('cpu' or 'cuda'), path ('compiled' or 'reference'), reason,
        library (file or None).
    """
    ways = [("cpu", op, LOADED) for op in PUBLIC]
    if torch.cuda.is_available():
        plain = Loaded("reference", "torch's own kernels serve it on CUDA", None)
        ways += [("cuda", op, plain if op in PLAIN_ON_CUDA else load_cuda_operators()) for op in PUBLIC]
    return [
        {"op": op, "device": device, "path": how.path, "reason": how.reason, "library": how.library}
        for device, op, how in ways
    ]


@torch.library.register_fake(f"{NAMESPACE}::roi_align3d")
def _roi_align3d_fake(
    features: Tensor,
    boxes: Tensor,
    batch_index: Tensor,
    out_d: int,
    out_h: int,
    out_w: int,
    scale_z: float,
    scale_y: float,
    scale_x: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    size = (boxes.shape[0], features.shape[1], out_d, out_h, out_w)
    return _new_volumes(features, size, reference.is_channels_last(features))


@torch.library.register_fake(f"{NAMESPACE}::roi_align3d_backward")
def _roi_align3d_backward_fake(
    grad: Tensor,
    boxes: Tensor,
    batch_index: Tensor,
    batch: int,
    depth: int,
    height: int,
    width: int,
    scale_z: float,
    scale_y: float,
    scale_x: float,
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    return _new_volumes(grad, (batch, grad.shape[1], depth, height, width), channels_last)


def _new_volumes(like: Tensor, size: tuple[int, int, int, int, int], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(size)
    n, c, d, h, w = size
    return like.new_empty((n, d, h, w, c)).permute(0, 4, 1, 2, 3)


@torch.library.register_fake(f"{NAMESPACE}::ms_deform_attn3d")
def _ms_deform_attn3d_fake(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    n, _, heads, channels = value.shape
    return value.new_empty((n, sampling_locations.shape[1], heads * channels))


@torch.library.register_fake(f"{NAMESPACE}::ms_deform_attn3d_backward")
def _ms_deform_attn3d_backward_fake(
    grad: Tensor, value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, attention_weights)
    grad_value, grad_locations, grad_weights = (tensor.new_empty(tensor.shape) for tensor in inputs)
    return grad_value, grad_locations, grad_weights


@torch.library.register_fake(f"{NAMESPACE}::nms3d")
def _nms3d_fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::batched_nms3d")
def _batched_nms3d_fake(boxes: Tensor, scores: Tensor, group: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::match_boxes3d")
def _match_boxes3d_fake(
    boxes: Tensor, truth: Tensor, foreground_iou: float, background_iou: float, match_best: bool
) -> Tensor:
    return boxes.new_empty(boxes.shape[:1], dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::mask_targets3d")
def _mask_targets3d_fake(
    label: Tensor, ids: Tensor, boxes: Tensor, out_d: int, out_h: int, out_w: int
) -> tuple[Tensor, Tensor]:
    size = (boxes.shape[0], out_d, out_h, out_w)
    return boxes.new_empty(size), boxes.new_empty(size, dtype=torch.bool)


@torch.library.register_fake(f"{NAMESPACE}::paste_masks3d")
def _paste_masks3d_fake(logits: Tensor, sizes: Tensor, boxes: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    num_voxels = torch.library.get_ctx().new_dynamic_size()
    return sizes.new_empty(boxes.shape), sizes.new_empty((num_voxels,), dtype=torch.bool)


@torch.library.register_fake(f"{NAMESPACE}::label_pairs")
def _label_pairs_fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return a.new_empty((num_pairs, 2), dtype=torch.int64), a.new_empty((num_pairs,), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::label_extents")
def _label_extents_fake(labels: Tensor, num_labels: int) -> Tensor:
    return labels.new_empty((num_labels, 10), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm")
def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm_backward")
def _layer_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@torch.library.register_fake(f"{NAMESPACE}::group_norm")
def _group_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), moments, torch.empty_like(moments)


@torch.library.register_fake(f"{NAMESPACE}::group_norm_backward")
def _group_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _roi_align3d_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    features, boxes, batch_index, _, _, _, *settings = inputs
    ctx.save_for_backward(boxes, batch_index)
    ctx.features_shape = features.shape  # type: ignore[attr-defined]
    ctx.settings = settings  # type: ignore[attr-defined]
    ctx.channels_last = reference.is_channels_last(features)  # type: ignore[attr-defined]


def _roi_align3d_gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, batch_index = ctx.saved_tensors  # type: ignore[attr-defined]
    batch, _, depth, height, width = ctx.features_shape  # type: ignore[attr-defined]
    _alert_if_not_deterministic("roi_align3d_backward", grad)
    grad_features = torch.ops.seg3d.roi_align3d_backward(
        grad,
        boxes,
        batch_index,
        batch,
        depth,
        height,
        width,
        *ctx.settings,  # type: ignore[attr-defined]
        ctx.channels_last,  # type: ignore[attr-defined]
    )
    return grad_features, *[None] * 10


def _ms_deform_attn3d_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ms_deform_attn3d_gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, spatial_shapes, sampling_locations, attention_weights = ctx.saved_tensors  # type: ignore[attr-defined]
    _alert_if_not_deterministic("ms_deform_attn3d_backward", grad)
    grad_value, grad_locations, grad_weights = torch.ops.seg3d.ms_deform_attn3d_backward(
        grad, value, spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _layer_norm_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, eps, relu = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (eps, relu)  # type: ignore[attr-defined]


def _layer_norm_gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.seg3d.layer_norm_backward(
        grad,
        *ctx.saved_tensors,  # type: ignore[attr-defined]
        *ctx.settings,  # type: ignore[attr-defined]
    )
    return *gradients, None, None


def _group_norm_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, groups, _, relu = inputs
    _, *moments = output
    ctx.save_for_backward(*tensors, *moments)
    ctx.mark_non_differentiable(*moments)
    ctx.settings = (groups, relu)  # type: ignore[attr-defined]


def _group_norm_gradient(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.seg3d.group_norm_backward(
        grad,
        *ctx.saved_tensors,  # type: ignore[attr-defined]
        *ctx.settings,  # type: ignore[attr-defined]
    )
    return *gradients, None, None, None


def _alert_if_not_deterministic(name: str, grad: Tensor) -> None:
    """Do as PyTorch's own operators: on CUDA sums are atomic, and their order is not fixed."""
    if not grad.is_cuda or not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"{name} has no deterministic implementation on CUDA, but torch.use_deterministic_algorithms(True) is set; "
        "turn it off for this operator, pass warn_only=True, or run it on the CPU, where it is deterministic"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


def _once_differentiable(name: str) -> Callable[..., None]:
    def raise_error(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name} can be differentiated once, and a second derivative was asked for; detach the gradient before it "
            "enters another loss"
        )

    return raise_error


for _name, _gradient, _context in (
    ("roi_align3d", _roi_align3d_gradient, _roi_align3d_context),
    ("ms_deform_attn3d", _ms_deform_attn3d_gradient, _ms_deform_attn3d_context),
    ("layer_norm", _layer_norm_gradient, _layer_norm_context),
    ("group_norm", _group_norm_gradient, _group_norm_context),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _gradient, setup_context=_context, lib=_LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}_backward", _once_differentiable(_name), lib=_LIBRARY)
