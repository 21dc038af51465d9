"""What set losses owe to ignored voxels: nothing is learned of them, and what lies on them costs nothing."""

import torch
from set_outputs import HALF_IGNORED, KINDS, leaves, look, make_criterion, make_outputs
from set_targets import GRID, SIZE, make_target


def test_unmatched_boxes_on_ignored_voxels_are_not_penalised():
    """Voxels with x >= 7 are ignored: centres at x = 6.9 are penalised, at 7 and past the border not."""
    outputs = make_outputs([HALF_IGNORED], num_queries=4)
    centres = torch.tensor([[3.0, 5, 6.9], [3, 5, 7], [9, 20, 30], [-4, -4, -4]])
    half = torch.tensor([1.0, 3, 8])
    boxes = torch.cat([centres - half, centres + half], 1)
    outputs["boxes"] = boxes.expand(4, 1, 4, 6).clone().requires_grad_()
    sum(make_criterion()(outputs, [HALF_IGNORED]).values()).backward()
    has_loss = (outputs["class_logits"].grad != 0).all(-1)
    assert torch.equal(has_loss, torch.tensor([True, False, False, True]).expand(4, 1, 4))


def test_matched_boxes_on_ignored_voxels_keep_their_loss():
    target = make_target([(1, 2, 8, 4, 6, 12)], [1], [9], ignore=[(0, 0, 0, 6, 10, 8), (2, 3, 9, 3, 5, 11)])
    outputs = make_outputs([target], num_queries=1)
    outputs["boxes"] = target["boxes"].double().expand(4, 1, 1, 6).clone().requires_grad_()
    assert target["label"][2, 4, 10] == -1, "the instance has a hole of ignored voxels at its centre"
    sum(make_criterion()(outputs, [target]).values()).backward()
    assert outputs["class_logits"].grad.all()


def test_unmatched_masks_on_ignored_voxels_are_not_penalised():
    """Without boxes the mask itself tells: features are 1 left and 1 right of the ignored half's face."""
    outputs = make_outputs([HALF_IGNORED], num_queries=4, with_boxes=False)
    maps = torch.zeros(1, 5, *GRID, dtype=torch.float64)
    maps[:, 0, ..., :3] = 1  # voxels x < 6
    maps[:, 1, ..., 4:] = 1  # voxels x >= 8
    maps[:, 2] = 1
    outputs["mask_features"] = maps.requires_grad_()
    embeds = torch.zeros(4, 5, dtype=torch.float64)
    embeds[0, 0] = embeds[1, 1] = 1  # left; right
    embeds[2, 2] = -1  # nowhere
    embeds[3, :2] = torch.tensor([2.0, 2.0])  # both, and less of the ignored side
    embeds[3, 2] = -1
    outputs["mask_embeds"] = embeds.expand(4, 1, 4, 5).clone().requires_grad_()
    criterion = make_criterion(False, num_uniform_points=2000)
    torch.manual_seed(0)
    sum(criterion(outputs, [HALF_IGNORED]).values()).backward()
    has_loss = (outputs["class_logits"].grad != 0).all(-1)
    assert has_loss[..., :3].flatten(0, 1).unique(dim=0).tolist() == [[True, False, True]]
    points, features = look(outputs, [HALF_IGNORED], num_uniform=2000)
    inside = points[0].values[features[0] @ embeds[3] > 0]
    assert torch.equal(has_loss[..., 3], ((inside == -1).sum() * 2 <= len(inside)).expand(4, 1))


def test_an_image_that_is_all_ignored_costs_nothing():
    target = make_target([], [], [], ignore=[(0, 0, 0, *SIZE)])
    for with_boxes, kind in KINDS:
        outputs = make_outputs([target], with_boxes=with_boxes, class_loss=kind)
        if not with_boxes:  # every mask holds something
            outputs["mask_features"] = outputs["mask_features"].detach().abs().requires_grad_()
            outputs["mask_embeds"] = outputs["mask_embeds"].detach().abs().requires_grad_()
        losses = make_criterion(with_boxes, kind)(outputs, [target])
        assert not any(loss.item() for loss in losses.values())
        sum(losses.values()).backward()
        assert not any(leaf.grad.any() for leaf in leaves(outputs))


def test_ignored_points_do_not_matter():
    """What the mask features say on ignored voxels changes no mask loss and gets no gradient."""
    target = make_target([(0, 0, 0, 6, 10, 4)], [1], [9], ignore=[(0, 0, 6, 6, 10, 14)])
    outputs = make_outputs([target])
    changed = outputs["mask_features"].detach().clone()
    changed[..., 4:] += 100  # cells past voxel 8: voxel 5, the last one known, reads cells 2 and 3 at most
    torch.manual_seed(0)
    wanted = make_criterion()(outputs, [target])
    torch.manual_seed(0)
    found = make_criterion()(outputs | {"mask_features": changed}, [target])
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    sum(wanted.values()).backward()
    assert not outputs["mask_features"].grad[..., 4:].any()
    assert outputs["mask_features"].grad[..., :3].any()
