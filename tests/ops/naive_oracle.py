"""RoIAlign, deformable attention and NMS as plain loops over Python floats.

They are written from the operators' definitions and not from the package.
"""

import math

import numpy as np


def roi_align(features, boxes, batch_index, out, scale, sampling_ratio, aligned):
    """features [N, C, D, H, W] -> [K, C, *out], float64, one sample and one corner at a time."""
    size = features.shape[2:]
    result = np.zeros((len(boxes), features.shape[1], *out))
    for k, box in enumerate(boxes):
        start, bins, counts = [], [], []
        for axis in range(3):
            shift = 0.5 if aligned else 0.0
            low, high = box[axis] * scale[axis] - shift, box[axis + 3] * scale[axis] - shift
            extent = high - low if aligned else max(high - low, 1.0)
            start.append(low)
            bins.append(extent / out[axis])
            counts.append(sampling_ratio if sampling_ratio > 0 else max(math.ceil(extent / out[axis]), 0))
        total = counts[0] * counts[1] * counts[2]
        for bin_index in np.ndindex(*out):
            for sample in np.ndindex(*counts):
                position = [
                    start[a] + bin_index[a] * bins[a] + (sample[a] + 0.5) * bins[a] / counts[a] for a in range(3)
                ]
                result[k, :, *bin_index] += trilinear(features[batch_index[k]], position, size) / total
    return result


def trilinear(volume, position, size):
    """One sample of volume [C, D, H, W]: 0 outside [-1, size], else clamped to the voxel centres."""
    if any(position[a] < -1 or position[a] > size[a] for a in range(3)):
        return np.zeros(len(volume))
    clamped = [min(max(position[a], 0.0), size[a] - 1.0) for a in range(3)]
    value = np.zeros(len(volume))
    for corner in np.ndindex(2, 2, 2):
        weight, voxel = 1.0, []
        for axis in range(3):
            low = math.floor(clamped[axis])
            fraction = clamped[axis] - low
            voxel.append(min(low + corner[axis], size[axis] - 1))
            weight *= fraction if corner[axis] else 1 - fraction
        value += weight * volume[:, *voxel]
    return value


def ms_deform_attn(value, shapes, locations, weights):
    """value [N, S, M, Dh], locations [N, Lq, M, L, P, 3], weights [N, Lq, M, L, P] -> [N, Lq, M * Dh], float64."""
    num_images, _, heads, channels = value.shape
    num_queries = locations.shape[1]
    result = np.zeros((num_images, num_queries, heads, channels))
    for n, q, m, level, point in np.ndindex(weights.shape):
        start = sum(math.prod(shape) for shape in shapes[:level])
        size = shapes[level]
        position = [float(f) * s - 0.5 for f, s in zip(locations[n, q, m, level, point], size, strict=True)]
        if not all(-1 <= p < s for p, s in zip(position, size, strict=True)):  # far outside, or NaN
            continue
        for corner in np.ndindex(2, 2, 2):
            voxel = [math.floor(position[axis]) + corner[axis] for axis in range(3)]
            if all(0 <= v < s for v, s in zip(voxel, size, strict=True)):
                share = math.prod(1 - abs(position[axis] - voxel[axis]) for axis in range(3))
                row = start + (voxel[0] * size[1] + voxel[1]) * size[2] + voxel[2]
                result[n, q, m] += weights[n, q, m, level, point] * share * value[n, row, m]
    return result.reshape(num_images, num_queries, heads * channels)


def iou(a, b):
    common = volume_a = volume_b = 1.0
    for axis in range(3):
        common *= max(0.0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]))
        volume_a *= max(0.0, a[axis + 3] - a[axis])
        volume_b *= max(0.0, b[axis + 3] - b[axis])
    return common / (volume_a + volume_b - common) if common > 0 else 0.0


def nms(boxes, scores, group, threshold):
    """Indices kept, by descending score, ties by lower index."""
    boxes, kept = [[float(c) for c in box] for box in boxes], []
    for index in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        if all(group[index] != group[other] or iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept
