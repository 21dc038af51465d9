"""Bind the operators to PyTorch when this module is imported: schemas, kernels, fake kernels, autograd.

A compiled library brings the schemas and the kernels of its devices. ops/reference.py serves every other device, or all
of them if there is no library; a later CUDA kernel takes its place simply by being in the library.
"""

import torch
from torch import Tensor

from seg3d_monai.ops import reference
from seg3d_monai.ops.loading import load_operators
from seg3d_monai.ops.schemas import NAMESPACE, SCHEMAS

REFERENCE_KERNELS = {
    "roi_align3d": reference.roi_align3d,
    "roi_align3d_backward": reference.roi_align3d_backward,
    "nms3d": reference.nms3d,
    "batched_nms3d": reference.batched_nms3d,
}
PUBLIC = ("roi_align3d", "nms3d", "batched_nms3d")

LOADED = load_operators()
# Registrations live as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if LOADED.path == "reference":
        _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, REFERENCE_KERNELS[_name], "CompositeExplicitAutograd")


def status() -> list[dict[str, str | None]]:
    """How each operator runs on the CPU in this process, for `seg3d doctor`.

    Returns:
        One dict per operator: op, path ('compiled' or 'reference'), reason, library (file or None).
    """
    return [{"op": op, "path": LOADED.path, "reason": LOADED.reason, "library": LOADED.library} for op in PUBLIC]


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
    return features.new_empty((boxes.shape[0], features.shape[1], out_d, out_h, out_w))


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
) -> Tensor:
    return grad.new_empty((batch, grad.shape[1], depth, height, width))


@torch.library.register_fake(f"{NAMESPACE}::nms3d")
def _nms3d_fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::batched_nms3d")
def _batched_nms3d_fake(boxes: Tensor, scores: Tensor, group: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _roi_align3d_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    features, boxes, batch_index, _, _, _, *settings = inputs
    ctx.save_for_backward(boxes, batch_index)
    ctx.features_shape = features.shape  # type: ignore[attr-defined]
    ctx.settings = settings  # type: ignore[attr-defined]


def _roi_align3d_gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, batch_index = ctx.saved_tensors  # type: ignore[attr-defined]
    batch, _, depth, height, width = ctx.features_shape  # type: ignore[attr-defined]
    grad_features = torch.ops.seg3d.roi_align3d_backward(
        grad,
        boxes,
        batch_index,
        batch,
        depth,
        height,
        width,
        *ctx.settings,  # type: ignore[attr-defined]
    )
    return grad_features, *[None] * 10


def _no_second_derivative(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> None:
    raise NotImplementedError(
        "roi_align3d can be differentiated once, and a second derivative was asked for; detach the gradient before it "
        "enters another loss"
    )


torch.library.register_autograd(
    f"{NAMESPACE}::roi_align3d", _roi_align3d_gradient, setup_context=_roi_align3d_context, lib=_LIBRARY
)
torch.library.register_autograd(f"{NAMESPACE}::roi_align3d_backward", _no_second_derivative, lib=_LIBRARY)
