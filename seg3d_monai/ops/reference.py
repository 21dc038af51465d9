"""The operators in plain PyTorch: the oracle of the kernels, and the path of a machine without a compiler.

RoIAlign's samples form a grid and trilinear weights are products, so pooling a box is one small matrix per axis. The
matrices of all boxes are made together; the features of one box at a time are multiplied with its three. NMS compares
blocks of boxes, in the order of their scores, with what is already kept.

The functions take the arguments of the schemas in ops/schemas.py, run on any device, and know nothing of how operators
are registered. Called directly, `roi_align3d` is differentiable by plain autograd.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.ops.boxes import pairwise_iou

BLOCK = 512
"""Boxes that NMS compares at once with all the kept ones."""
PAIRS = 2**22
"""Pairs of a box and a true box that matching holds at once."""
IGNORED_CODE = 2**31 - 1
"""What -1 becomes where labels are looked up as int32."""


def roi_align3d(
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
    """Pool features [N, C, D, H, W] in boxes [K, 6] to [K, C, d, h, w]; see `seg3d_monai.ops.roi_align3d`."""
    out, scale = (out_d, out_h, out_w), (scale_z, scale_y, scale_x)
    accumulate = torch.promote_types(features.dtype, torch.float32)
    pooled = []
    with torch.autocast(features.device.type, enabled=False):
        weights = _axis_weights(features, boxes, features.shape[2:], out, scale, sampling_ratio, aligned)
        for image, (z, y, x), (wz, wy, wx) in _boxes_apart(batch_index, len(features), weights):
            crop = features[image, :, z, y, x].to(accumulate)
            rows = wy @ (crop @ wx.mT)
            pooled.append((wz @ rows.flatten(2)).unflatten(2, rows.shape[2:]).to(features.dtype))
    result = torch.stack(pooled) if pooled else features.new_zeros((0, features.shape[1], *out))
    return result.contiguous(memory_format=torch.channels_last_3d) if is_channels_last(features) else result


def roi_align3d_backward(
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
    """Gradient [N, C, D, H, W] of `roi_align3d` with respect to its features, from grad [K, C, d, h, w]."""
    size, scale = (depth, height, width), (scale_z, scale_y, scale_x)
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    grad_features = grad.new_zeros((batch, grad.shape[1], *size), dtype=accumulate)
    with torch.autocast(grad.device.type, enabled=False):
        weights = _axis_weights(grad, boxes, size, grad.shape[2:], scale, sampling_ratio, aligned)
        for index, (image, (z, y, x), (wz, wy, wx)) in enumerate(_boxes_apart(batch_index, batch, weights)):
            bins = grad[index].to(accumulate)
            rows = (wz.mT @ bins.flatten(2)).unflatten(2, bins.shape[2:])
            grad_features[image, :, z, y, x] += (wy.mT @ rows) @ wx
    grad_features = grad_features.to(grad.dtype)
    return grad_features.contiguous(memory_format=torch.channels_last_3d) if channels_last else grad_features


def is_channels_last(volumes: Tensor) -> bool:
    """Whether the channels of [N, C, D, H, W] lie side by side in memory, and not the voxels."""
    return volumes.shape[1] > 1 and volumes.stride(1) == 1 and volumes.stride(4) != 1


def ms_deform_attn3d(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum samples of value [N, S, M, Dh] to [N, Lq, M * Dh]; see `seg3d_monai.ops.ms_deform_attn3d`."""
    n, queries, heads = sampling_locations.shape[:3]
    result = sampling_locations.new_zeros((n, queries, heads, value.shape[3]))
    image, head = _image_and_head(value)
    with torch.autocast(value.device.type, enabled=False):
        for corner in _corners(value, spatial_shapes, sampling_locations, attention_weights):
            rows = value[image, corner.row, head].to(result.dtype)
            result += torch.einsum("nqmp,nqmpc->nqmc", corner.weight * corner.attention, corner.masked(rows))
    return result.flatten(2).to(value.dtype)


def ms_deform_attn3d_backward(
    grad: Tensor, value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `ms_deform_attn3d` with respect to value, locations and weights, from grad [N, Lq, M * Dh]."""
    accumulate = sampling_locations.dtype
    grads = grad.unflatten(2, value.shape[2:]).to(accumulate)
    grad_value = value.new_zeros(value.shape, dtype=accumulate)
    grad_locations = torch.zeros_like(sampling_locations)
    grad_weights = torch.zeros_like(attention_weights)
    image, head = _image_and_head(value)
    with torch.autocast(value.device.type, enabled=False):
        for corner in _corners(value, spatial_shapes, sampling_locations, attention_weights):
            rows = corner.masked(value[image, corner.row, head].to(accumulate))
            product = torch.einsum("nqmc,nqmpc->nqmp", grads, rows)
            grad_weights[:, :, :, corner.level] += corner.weight * product
            grad_locations[:, :, :, corner.level] += corner.slope * (corner.attention * product)[..., None]
            share = (corner.weight * corner.attention)[..., None] * grads[:, :, :, None]
            index = (image.expand_as(corner.row), corner.row, head.expand_as(corner.row))
            grad_value.index_put_(index, corner.masked(share), accumulate=True)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def nms3d(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices [M] of the boxes that greedy suppression keeps; see `seg3d_monai.ops.nms3d`."""
    return batched_nms3d(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms3d(boxes: Tensor, scores: Tensor, group: Tensor, iou_threshold: float) -> Tensor:
    """Indices [M] of the boxes that are kept within each group; see `seg3d_monai.ops.batched_nms3d`."""
    if not bool(torch.isfinite(boxes).all()):
        raise ValueError("boxes must be finite; remove boxes with NaN or infinite corners")
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores must not be NaN; remove those boxes")
    order = scores.argsort(descending=True, stable=True)
    # float64 everywhere but on Apple's GPUs, which have none.
    boxes = boxes[order].to(torch.float32 if boxes.device.type == "mps" else torch.float64)
    group = group[order]
    kept = order.new_zeros(0)
    for start in range(0, len(boxes), BLOCK):
        block = torch.arange(start, min(start + BLOCK, len(boxes)), device=boxes.device)
        for earlier in kept.split(8 * BLOCK):
            hit = _overlaps(boxes, group, earlier, block, iou_threshold).any(0)
            block = block[~hit]
        # Within the block a box stays unless a kept box of a higher score hits it. Counting up from "all stay", each
        # round settles at least one more box of every chain, so the rounds end at the greedy answer.
        hits = _overlaps(boxes, group, block, block, iou_threshold).triu(1)
        stays = torch.ones_like(block, dtype=torch.bool)
        while True:
            settled = ~(hits & stays[:, None]).any(0)
            if bool((settled == stays).all()):
                break
            stays = settled
        kept = torch.cat([kept, block[stays]])
    return order[kept]


def match_boxes3d(
    boxes: Tensor, truth: Tensor, foreground_iou: float, background_iou: float, match_best: bool
) -> Tensor:
    """Assign boxes [M, 6] to true boxes [G, 6]; see `seg3d_monai.ops.match_boxes3d`."""
    matched = boxes.new_full((len(boxes),), -1, dtype=torch.int64)
    if not len(boxes) or not len(truth):
        return matched
    chunks = boxes.split(max(1, PAIRS // len(truth)))
    truth_best = truth.new_zeros(len(truth))
    for chunk, result in zip(chunks, matched.split(len(chunks[0])), strict=True):
        iou = _iou_of_numbers(truth, chunk)
        value, index = iou.max(0)
        result.copy_(index.masked_fill_(value < foreground_iou, -2).masked_fill_(value < background_iou, -1))
        truth_best = torch.maximum(truth_best, iou.amax(1))
    if match_best:
        for chunk, result in zip(chunks, matched.split(len(chunks[0])), strict=True):
            iou = _iou_of_numbers(truth, chunk)
            is_best = (iou == truth_best[:, None]) & (iou > 0)
            result.copy_(torch.where(is_best.any(0), is_best.int().argmax(0), result))
    return matched


def _iou_of_numbers(truth: Tensor, boxes: Tensor) -> Tensor:
    """IoU [G, M], 0 where it is no number."""
    return pairwise_iou(truth, boxes).nan_to_num_(0.0)


def mask_targets3d(
    label: Tensor, ids: Tensor, boxes: Tensor, out_d: int, out_h: int, out_w: int
) -> tuple[Tensor, Tensor]:
    """Occupancy [P, out_d, out_h, out_w] of instances in boxes; see `seg3d_monai.ops.mask_targets3d`."""
    bins = (out_d, out_h, out_w)
    (z, dz), (y, dy), (x, dx) = (_bin_taps(boxes, axis, bins[axis], label.shape[axis]) for axis in range(3))
    rows = z[:, None, :, :, None] * label.shape[1] + y[:, :, None]
    voxels = rows[:, :, None, ..., None] * label.shape[2] + x[:, :, None, None]
    found = _codes(label).flatten().index_select(0, voxels.flatten()).view(voxels.shape)
    valid = found.amax((0, 1, 2)) != IGNORED_CODE
    occupancy = found.eq_(_codes(ids)[:, None, None, None]).float()  # in place: a bool takes several times as long
    for weight in (dz[:, :, None, None], dy[:, None, :, None], dx[:, None, None, :]):
        occupancy = torch.lerp(occupancy[0], occupancy[1], weight)
    return occupancy, valid


def paste_masks3d(logits: Tensor, sizes: Tensor, boxes: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """Regions [N, 6] and voxels [V] of the masks of all detections; see `seg3d_monai.ops.paste_masks3d`."""
    rois = torch.cat([boxes[:, :3].floor(), boxes[:, 3:].ceil()], 1).long()
    inside = (boxes - 0.5).ceil().long()  # the voxels whose centres the box holds
    grids = logits.split(sizes.prod(1).tolist())
    masks = [logits.new_empty(0, dtype=torch.bool)]
    for grid, size, box, roi, window in zip(grids, sizes.tolist(), boxes, rois, inside, strict=True):
        value = grid.view(size)
        for axis, bins in enumerate(size):
            centre = torch.arange(int(window[axis]), int(window[axis + 3]), device=boxes.device) + 0.5 - box[axis]
            bins_per_voxel = bins / (box[axis + 3] - box[axis]).clamp(min=1e-6)
            position = (centre * bins_per_voxel - 0.5).clamp(0, bins - 1)
            weight = 1 - (torch.arange(bins, device=boxes.device)[:, None] - position).abs()
            # The first axis is contracted and comes back as the last: after three rounds they stand as before.
            value = torch.tensordot(value, weight.clamp(min=0).to(value.dtype), dims=([0], [0]))
        mask = torch.zeros((roi[3:] - roi[:3]).tolist(), dtype=torch.bool, device=logits.device)
        low, high = (window[:3] - roi[:3]).tolist(), (window[3:] - roi[:3]).tolist()
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value > cut
        masks.append(mask.flatten())
    return rois, torch.cat(masks)


def label_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of labels [P, 2] and their numbers of voxels [P]; see `seg3d_monai.ops.label_pairs`."""
    if a.numel() and min(int(a.min()), int(b.min())) < 0:
        raise RuntimeError("label_pairs: a label is negative")
    keys, counts = (a.long().flatten() << 32 | b.long().flatten()).unique(return_counts=True)
    return torch.stack([keys >> 32, keys & 0xFFFFFFFF], 1), counts


def label_extents(labels: Tensor, num_labels: int) -> Tensor:
    """Voxels, sums of coordinates, lower and upper corners [L, 10]; see `seg3d_monai.ops.label_extents`."""
    where = labels.nonzero()
    values = labels[tuple(where.T)].long()
    if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= num_labels:
        raise RuntimeError("label_extents: a label is not in 0 to num_labels")
    row = (values - 1)[:, None].expand(-1, 3)
    empty = where.new_zeros((num_labels, 3))
    return torch.cat(
        [
            torch.bincount(values - 1, minlength=num_labels)[:num_labels, None],
            empty.scatter_add(0, row, where),
            empty.scatter_reduce(0, row, where, "amin", include_self=False),
            empty.scatter_reduce(0, row, where + 1, "amax", include_self=False),
        ],
        1,
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """Norm each row of x [..., C]; see `seg3d_monai.ops.layer_norm`."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows, scale, offset = (tensor.to(accumulate).contiguous() for tensor in (x, weight, bias))
        result = F.layer_norm(rows, scale.shape, scale, offset, eps).to(x.dtype)
    return torch.relu(result) if relu else result


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` with respect to x, weight and bias, from grad [..., C]."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        grads, rows, scale, offset = (tensor.to(accumulate).contiguous() for tensor in (grad, x, weight, bias))
        result, mean, rstd = torch.native_layer_norm(rows, scale.shape, scale, offset, eps)
        if relu:
            grads = grads.masked_fill(result.to(x.dtype) <= 0, 0.0)
        gradients = torch.ops.aten.native_layer_norm_backward(
            grads, rows, scale.shape, mean, rstd, scale, offset, [True, True, True]
        )
    grad_x, grad_weight, grad_bias = (g.to(like.dtype) for g, like in zip(gradients, (x, weight, bias), strict=True))
    return grad_x, grad_weight, grad_bias


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm the groups of channels of x [N, C, ...]; see `seg3d_monai.ops.group_norm`.

    Returns:
        The result, and for the backward pass, float32 or better, the mean [N, groups] of a group, as the distance from
        the first of its values, and 1 / sqrt(variance + eps) [N, groups].
    """
    if x.numel() == 0:
        zeros = x.new_zeros((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))
        return x.new_empty(x.shape), zeros, zeros.clone()
    with torch.autocast(x.device.type, enabled=False):
        shifted = _shifted_groups(x, groups)
        scale, offset = (tensor.to(shifted.dtype).contiguous() for tensor in (weight, bias))
        _, mean, rstd = torch.native_group_norm(shifted, scale, offset, *_group_sizes(x), groups, eps)
        result = _normed_groups(shifted, scale, offset, mean, rstd).to(x.dtype)
    return torch.relu(result) if relu else result, mean, rstd


def group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `group_norm` with respect to x, weight and bias, from grad [N, C, ...] and the moments."""
    if x.numel() == 0:
        return x.new_empty(x.shape), torch.zeros_like(weight), torch.zeros_like(bias)
    with torch.autocast(x.device.type, enabled=False):
        shifted = _shifted_groups(x, groups)
        grads, scale, offset = (tensor.to(shifted.dtype).contiguous() for tensor in (grad, weight, bias))
        if relu:
            result = _normed_groups(shifted, scale, offset, mean, rstd).to(x.dtype)
            grads = grads.masked_fill(result <= 0, 0.0)
        gradients = torch.ops.aten.native_group_norm_backward(
            grads, shifted, mean, rstd, scale, *_group_sizes(x), groups, [True, True, True]
        )
    grad_x, grad_weight, grad_bias = (g.to(like.dtype) for g, like in zip(gradients, (x, weight, bias), strict=True))
    return grad_x, grad_weight, grad_bias


def _group_sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of cells of x [N, C, ...]."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _shifted_groups(x: Tensor, groups: int) -> Tensor:
    """x [N, C, ...] less the first number of each group, contiguous, float32 or better."""
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, -1)
    return (grouped - grouped[..., :1]).view(x.shape)


def _normed_groups(shifted: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The result of `group_norm` before it is rounded, in the same way forward and backward."""
    centred = shifted.view(*mean.shape, -1) - mean[..., None]
    slope, shift = (vector.view(-1, *[1] * (shifted.dim() - 2)) for vector in (weight, bias))
    return (centred * rstd[..., None]).view(shifted.shape) * slope + shift


@dataclass(frozen=True)
class _Corner:
    """One of the eight corners of all samples of one level; tensors are [N, Lq, M, P]."""

    level: int
    row: Tensor
    """Its row in the value, any valid one if it is outside."""
    is_inside: Tensor
    weight: Tensor
    """Trilinear, 0 outside."""
    slope: Tensor
    """[N, Lq, M, P, 3], of the weight, with respect to the location."""
    attention: Tensor

    def masked(self, rows: Tensor) -> Tensor:
        """`rows` [..., Dh], zero for corners that are outside, whatever value stands there."""
        return torch.where(self.is_inside[..., None], rows, 0.0)


def _corners(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Iterator[_Corner]:
    """All corners of all levels. The arithmetic, to the order of its operations, is that of csrc/trilinear.h."""
    shapes = spatial_shapes.tolist()
    if min(itertools.chain(*shapes), default=1) < 1 or sum(map(math.prod, shapes)) != value.shape[1]:
        raise ValueError(f"spatial_shapes {shapes} must be positive and cover the {value.shape[1]} rows of value")
    start = 0
    for level, shape in enumerate(shapes):
        size = sampling_locations.new_tensor(shape)
        position = sampling_locations[:, :, :, level] * size - 0.5
        is_near = (position >= -1) & (position < size)
        position = torch.where(is_near, position, 0.0)
        low = position.floor()
        fraction = position - low
        for bits in itertools.product((0, 1), repeat=3):
            bit = low.new_tensor(bits)
            voxel = low + bit
            is_inside = (is_near & (voxel >= 0) & (voxel < size)).all(-1)
            place = torch.where(is_inside[..., None], voxel, 0.0).long()
            z, y, x = torch.where(bit > 0, fraction, 1 - fraction).unbind(-1)
            slope = torch.stack([y * x, z * x, z * y], -1) * (2 * bit - 1) * size
            yield _Corner(
                level=level,
                row=start + (place[..., 0] * shape[1] + place[..., 1]) * shape[2] + place[..., 2],
                is_inside=is_inside,
                weight=torch.where(is_inside, z * y * x, 0.0),
                slope=torch.where(is_inside[..., None], slope, 0.0),
                attention=attention_weights[:, :, :, level],
            )
        start += shape[0] * shape[1] * shape[2]


def _image_and_head(value: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the first and third axis of value that broadcast with [N, Lq, M, P]."""
    image = torch.arange(value.shape[0], device=value.device)[:, None, None, None]
    head = torch.arange(value.shape[2], device=value.device)[None, None, :, None]
    return image, head


def _overlaps(boxes: Tensor, group: Tensor, first: Tensor, second: Tensor, iou_threshold: float) -> Tensor:
    """Whether box first[i] and box second[j] share a group and have an IoU over the threshold, bool [I, J]."""
    a, b = boxes[first], boxes[second]
    common = a.new_ones(())
    for axis in range(3):
        high = torch.minimum(a[:, None, axis + 3], b[None, :, axis + 3])
        common = common * (high - torch.maximum(a[:, None, axis], b[None, :, axis])).clamp_(min=0)
    volume_a, volume_b = ((c[:, 3:] - c[:, :3]).clamp(min=0).prod(1) for c in (a, b))
    union = volume_a[:, None] + volume_b[None] - common
    # 0 / 0 of two empty boxes is NaN, and NaN is not over any threshold.
    return (common / union > iou_threshold) & (group[first][:, None] == group[second][None])


def _boxes_apart(
    batch_index: Tensor, num_images: int, weights: list[Tensor]
) -> Iterator[tuple[int, tuple[slice, ...], tuple[Tensor, ...]]]:
    """Per box: its image, the slices (z, y, x) of voxels that it reads, and its matrices [out, voxels] for them."""
    images = batch_index.tolist()
    for index, image in enumerate(images):
        if not 0 <= image < num_images:
            raise ValueError(f"batch_index[{index}] = {image} is outside the batch of {num_images} images")
    bounds = []
    for matrix in weights:
        is_read = (matrix != 0).any(1)
        position = torch.arange(matrix.shape[2], device=matrix.device)
        first = torch.where(is_read, position, matrix.shape[2]).amin(1)
        last = torch.where(is_read, position, -1).amax(1)
        bounds.append(list(zip(first.tolist(), (last + 1).tolist(), strict=True)))
    for index, image in enumerate(images):
        # A box that reads nothing gets empty slices; matrices without columns multiply to zeros.
        spans = [(low, high) if low < high else (0, 0) for low, high in (axis[index] for axis in bounds)]
        matrices = tuple(matrix[index, :, low:high] for matrix, (low, high) in zip(weights, spans, strict=True))
        yield image, tuple(slice(low, high) for low, high in spans), matrices


def _axis_weights(
    values: Tensor,
    boxes: Tensor,
    size: tuple[int, ...],
    out: tuple[int, ...],
    scale: tuple[float, ...],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """Per axis the matrices [K, out, size] that take voxels to bins, in the dtype that `values` accumulate in.

    The arithmetic, to the order of its operations, is that of csrc/trilinear.h.
    """
    accumulate = torch.promote_types(values.dtype, torch.float32)
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, accumulate))
    offset = 0.5 if aligned else 0.0
    weights = []
    for axis in range(3):
        start = boxes[:, axis] * scale[axis] - offset
        extent = boxes[:, axis + 3] * scale[axis] - offset - start
        if not aligned:
            extent = extent.clamp(min=1)
        extent = extent[:, None]
        bin_extent = extent / out[axis]
        base = start[:, None] + torch.arange(out[axis], dtype=boxes.dtype, device=boxes.device) * bin_extent
        if not bool(torch.isfinite(base).all()):
            raise ValueError("boxes must be finite after scaling; remove boxes with NaN or infinite corners")
        if sampling_ratio > 0:
            grid = torch.full_like(bin_extent, sampling_ratio)
            first, count = torch.zeros_like(base), sampling_ratio
        else:
            # Only the samples that can touch the axis: their number is bounded by the axis, not by the box.
            grid = bin_extent.ceil().clamp(min=0)
            step = bin_extent / grid
            first = (((-1 - base) / step - 0.5).floor() - 1).nan_to_num(0.0).clamp(min=0).minimum(grid)
            count = int((grid - first).amax().clamp(max=2 * size[axis] + 8)) if len(boxes) else 0
        voxel = torch.arange(size[axis], dtype=torch.int64, device=boxes.device)
        matrix = boxes.new_zeros((len(boxes), out[axis], size[axis]))
        for number in range(count):
            sample = first + number
            position = base + (sample + 0.5) * bin_extent / grid
            inside = (sample < grid) & (position >= -1) & (position <= size[axis])
            position = torch.where(inside, position, 0.0).clamp(min=0, max=size[axis] - 1)
            low = position.floor()
            fraction = torch.where(inside, position - low, 0.0)[..., None]
            low = torch.where(inside, low, -2.0).long()[..., None]
            matrix += torch.where(voxel == low, 1 - fraction, 0.0) + torch.where(voxel == low + 1, fraction, 0.0)
        weights.append(torch.where(grid[..., None] > 0, matrix / grid[..., None], 0.0).to(accumulate))
    return weights


def _codes(label: Tensor) -> Tensor:
    """int64 -1 .. 2**32 - 2 -> int32, which is looked up and compared in half the time; -1 wraps to the largest."""
    return (label.long() - 2**31).int()


def _bin_taps(boxes: Tensor, axis: int, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """The two voxels int32 [2, P, bins] on either side of bin centres on one axis, and weight [P, bins] of the second.

    A centre on a voxel has that one twice, so that only voxels with a share are looked up.
    """
    start, end = boxes[:, axis, None].float(), boxes[:, axis + 3, None].float()
    step = (torch.arange(bins, device=boxes.device) + 0.5) / bins
    position = (start + (end - start) * step - 0.5).clamp(0, size - 1)
    lower = position.floor()
    return torch.stack([lower, position.ceil()]).int(), position - lower
