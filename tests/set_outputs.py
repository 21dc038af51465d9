"""Free outputs of a decoder for the small volumes, and the criterion that they are held against."""

import torch
from set_targets import GRID, SIZE, STRIDE, make_target

from seg3d_monai.losses import SetCriterion
from seg3d_monai.matching import HungarianMatcher, point_features, sample_points

HALF_IGNORED = make_target([], [], [], ignore=[(0, 0, 7, 6, 10, 14)])
KINDS = [(True, "focal"), (False, "cross_entropy"), (True, "cross_entropy"), (False, "focal")]


def make_criterion(with_boxes=True, class_loss="focal", **changes):
    matcher = HungarianMatcher(
        class_weight=2.0,
        mask_bce_weight=5.0,
        mask_dice_weight=5.0,
        box_l1_weight=5.0 * with_boxes,
        box_giou_weight=2.0 * with_boxes,
        class_cost="focal" if class_loss == "focal" else "softmax",
    )
    settings = {"num_uniform_points": 40, "num_instance_points": 12, "class_loss": class_loss}
    return SetCriterion(matcher=matcher, **(settings | changes))


def draw(num_layers, num_images, num_queries, generator, *, with_boxes, num_logits, dtype):
    shape = (num_layers, num_images, num_queries)
    size = torch.tensor(SIZE, dtype=torch.float64)
    lower = torch.rand(*shape, 3, generator=generator, dtype=torch.float64) * size * 0.7
    extent = 0.5 + torch.rand(*shape, 3, generator=generator, dtype=torch.float64) * size * 0.5
    values = {
        "class_logits": torch.randn(*shape, num_logits, generator=generator, dtype=torch.float64),
        "mask_embeds": torch.randn(*shape, 5, generator=generator, dtype=torch.float64),
        "boxes": torch.cat([lower, lower + extent], -1),
    }
    if not with_boxes:
        del values["boxes"]
    return {key: value.to(dtype).requires_grad_() for key, value in values.items()}


def make_outputs(
    targets, *, num_queries=8, with_boxes=True, class_loss="focal", denoising=False, dtype=torch.float64, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "with_boxes": with_boxes,
        "num_logits": 3 if class_loss == "focal" else 4,
        "dtype": dtype,
    }
    outputs = draw(4, len(targets), num_queries, generator, **settings)
    outputs["names"] = ["encoder", "initial", "1", "2"]
    maps = torch.randn(len(targets), 5, *GRID, generator=generator, dtype=torch.float64)
    outputs |= {"mask_features": maps.to(dtype).requires_grad_(), "mask_stride": STRIDE}
    if denoising:
        # Two groups: of each instance a positive, then a negative query; shorter images are padded.
        most = max(len(target["ids"]) for target in targets)
        outputs["denoising"] = draw(2, len(targets), 4 * most, generator, **settings)
        index = torch.full((len(targets), 4 * most), -2)
        for n, target in enumerate(targets):
            num_instances = len(target["ids"])
            for group in range(2):
                start = 2 * most * group
                index[n, start : start + num_instances] = torch.arange(num_instances)
                index[n, start + most : start + most + num_instances] = -1
        outputs["denoising"]["target_index"] = index
    return outputs


def leaves(outputs):
    found = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return found + (leaves(outputs["denoising"]) if "denoising" in outputs else [])


def look(outputs, targets, num_uniform=40, num_own=12, seed=0):
    """The points that the criterion draws from the same seed, and features there."""
    torch.manual_seed(seed)
    points = [sample_points(target, num_uniform=num_uniform, num_own=num_own) for target in targets]
    maps = outputs["mask_features"].detach()
    return points, [point_features(maps[n], STRIDE, p.coordinates) for n, p in enumerate(points)]
