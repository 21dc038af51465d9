"""Each loss of Mask R-CNN against its formula in NumPy float64, and what must not matter."""

import numpy as np
import pytest
import set_targets
import torch

from seg3d_monai.losses import MaskRCNNCriterion
from seg3d_monai.matching import IoUMatcher
from seg3d_monai.ops import mask_targets3d

SIZE = (8, 16, 24)
GRID = (4, 6, 8)
NAMES = ["objectness", "anchor_box", "class", "roi_box", "mask_bce", "mask_dice"]


def make_criterion(**changes):
    matcher = IoUMatcher(foreground_iou=0.5, background_iou=0.25, match_best=True)
    return MaskRCNNCriterion(**({"matcher": matcher, "num_anchor_samples": 10_000} | changes))


def make_target(*arguments, **settings):
    return set_targets.make_target(*arguments, **settings, size=SIZE)


# Touching boxes, several classes, ids with gaps, an ignored slab; and an image without any instance.
MANY = make_target(
    [(0, 0, 0, 4, 8, 8), (0, 0, 8, 4, 8, 16), (4, 8, 0, 8, 16, 12), (4, 9, 13, 7, 15, 22)],
    [0, 1, 1, 0],
    [7, 3, 40, 5],
    ignore=[(0, 8, 16, 4, 16, 24), (4, 12, 8, 8, 16, 12)],
)
NONE = make_target([], [], [])


def anchors():
    axes = torch.meshgrid(torch.arange(2, 8, 4), torch.arange(2, 16, 4), torch.arange(2, 24, 4), indexing="ij")
    centre = torch.stack(axes, -1).reshape(-1, 3).float()
    half = torch.tensor([[2.0, 4, 4], [2, 3, 5]])
    return torch.cat([centre[:, None] - half, centre[:, None] + half], 2).reshape(-1, 6)


def make_outputs(targets, num_classes=2, rois_of=None):
    """Random outputs; every true box is a RoI, shifted a little, and every image has two background RoIs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).requires_grad_()

    every_anchor = anchors()
    rois, batch, matched = [], [], []
    for n, target in enumerate(targets):
        for g, box in enumerate(target["boxes"]):
            rois.append(box + torch.tensor([0.0, 0.3, -0.4, 0.5, 1.0, 0.7]) * (g + 1) / 2)
            batch.append(n)
            matched.append(g)
        rois += [torch.tensor([1.0, 2, 3, 5, 6, 7]), torch.tensor([0.5, 6, 9, 7, 12.5, 20])]
        batch += [n, n]
        matched += [-1, -1]
    rois, batch, matched = torch.stack(rois), torch.tensor(batch), torch.tensor(matched)
    foreground = matched >= 0
    return {
        "anchors": every_anchor,
        "objectness": draw(len(targets), len(every_anchor)),
        "anchor_deltas": draw(len(targets), len(every_anchor), 6),
        "rois": rois,
        "roi_batch": batch,
        "roi_matched": matched,
        "class_logits": draw(len(rois), num_classes + 1),
        "roi_deltas": draw(len(rois), 6),
        "mask_rois": rois[foreground],
        "mask_batch": batch[foreground],
        "mask_matched": matched[foreground],
        "mask_logits": draw(int(foreground.sum()), num_classes, *GRID),
    }


def as_numpy(tensor):
    return tensor.detach().double().numpy() if tensor.is_floating_point() else tensor.numpy()


def bce(logit, truth):
    prob = 1 / (1 + np.exp(-logit))
    return -(truth * np.log(prob) + (1 - truth) * np.log(1 - prob))


def smooth_l1(difference, beta):
    size = np.abs(difference)
    return np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def encode(truth, box, weights=(1, 1)):
    extent, wanted = box[3:] - box[:3], truth[3:] - truth[:3]
    shift = (truth[:3] + truth[3:] - box[:3] - box[3:]) / 2 / extent
    return np.concatenate([weights[0] * shift, weights[1] * np.log(wanted / extent)])


@pytest.mark.parametrize("targets", [[MANY], [NONE], [NONE, MANY], [MANY, NONE, MANY]])
def test_anchor_losses(targets):
    outputs = make_outputs(targets)
    losses = make_criterion()(outputs, targets)
    matcher = IoUMatcher(foreground_iou=0.5, background_iou=0.25, match_best=True)
    objectness = box_loss = 0
    for n, target in enumerate(targets):
        of_image, of_boxes, count = 0, 0, 0
        for a, match in enumerate(matcher(outputs["anchors"], target["boxes"], target["label"]).tolist()):
            if match == -2:
                continue
            count += 1
            of_image += bce(as_numpy(outputs["objectness"])[n, a], float(match >= 0))
            if match >= 0:
                wanted = encode(as_numpy(target["boxes"])[match], as_numpy(outputs["anchors"])[a])
                of_boxes += smooth_l1(as_numpy(outputs["anchor_deltas"])[n, a] - wanted, 1 / 9).sum()
        objectness += of_image / count / len(targets)
        box_loss += of_boxes / count / len(targets)
    assert losses["objectness"].item() == pytest.approx(objectness, rel=1e-5)
    assert losses["anchor_box"].item() == pytest.approx(box_loss, rel=1e-5)


@pytest.mark.parametrize("targets", [[MANY], [NONE], [NONE, MANY], [MANY, NONE, MANY]])
def test_roi_losses(targets):
    outputs = make_outputs(targets)
    losses = make_criterion()(outputs, targets)
    class_loss = box_loss = 0
    images = outputs["roi_batch"].tolist()
    for r, (n, match) in enumerate(zip(images, outputs["roi_matched"].tolist(), strict=True)):
        share = 1 / images.count(n) / len(targets)
        logits = as_numpy(outputs["class_logits"])[r]
        wanted_class = 2 if match < 0 else targets[n]["classes"][match].item()
        class_loss += share * (np.log(np.exp(logits).sum()) - logits[wanted_class])
        if match >= 0:
            wanted = encode(as_numpy(targets[n]["boxes"])[match], as_numpy(outputs["rois"])[r], (10, 5))
            box_loss += share * smooth_l1(as_numpy(outputs["roi_deltas"])[r] - wanted, 1.0).sum()
    assert losses["class"].item() == pytest.approx(class_loss, rel=1e-5)
    assert losses["roi_box"].item() == pytest.approx(box_loss, rel=1e-4)


@pytest.mark.parametrize("targets", [[MANY], [NONE], [NONE, MANY], [MANY, NONE, MANY]])
def test_mask_losses(targets):
    outputs = make_outputs(targets)
    losses = make_criterion()(outputs, targets)
    found = {n: [] for n, target in enumerate(targets) if len(target["ids"])}
    for p, (n, match) in enumerate(zip(outputs["mask_batch"].tolist(), outputs["mask_matched"].tolist(), strict=True)):
        target = targets[n]
        occupancy, valid = mask_targets3d(
            target["label"], target["ids"][match : match + 1], outputs["mask_rois"][p : p + 1], GRID
        )
        logits = as_numpy(outputs["mask_logits"])[p, target["classes"][match]][valid[0].numpy()]
        truth = as_numpy(occupancy[0])[valid[0].numpy()]
        prob = 1 / (1 + np.exp(-logits))
        dice = 1 - (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)
        found[n].append((bce(logits, truth).sum(), len(truth), dice))
    means = [
        (sum(c for c, _, _ in of) / sum(n for _, n, _ in of), np.mean([d for *_, d in of])) for of in found.values()
    ]
    wanted = np.mean(means, 0) if means else (0, 0)  # over bins or masks of an image, then over images with instances
    assert losses["mask_bce"].item() == pytest.approx(wanted[0], rel=1e-5)
    assert losses["mask_dice"].item() == pytest.approx(wanted[1], rel=1e-5)


@pytest.mark.parametrize("targets", [[NONE, MANY], [MANY, NONE, MANY, NONE], [NONE, NONE]])
def test_it_does_not_matter_which_images_are_in_one_batch(targets):
    """The losses of one batch are the sum of those of its images alone, with the same counts."""
    outputs, criterion = make_outputs(targets), make_criterion()
    whole = criterion(outputs, targets)
    counts = MaskRCNNCriterion.count(targets)
    total = dict.fromkeys(NAMES, 0.0)
    for n, target in enumerate(targets):
        part = {"anchors": outputs["anchors"]}
        part |= {key: outputs[key][n : n + 1] for key in ("objectness", "anchor_deltas")}
        for kind, keys in (("roi", ["rois", "class_logits", "roi_deltas"]), ("mask", ["mask_rois", "mask_logits"])):
            rows = outputs[f"{kind}_batch"] == n
            part |= {key: outputs[key][rows] for key in [*keys, f"{kind}_matched"]}
            part[f"{kind}_batch"] = torch.zeros(int(rows.sum()), dtype=torch.int64)
        for name, loss in criterion(part, [target], counts).items():
            total[name] += loss.item()
    for name in NAMES:
        assert whole[name].item() == pytest.approx(total[name], rel=1e-5)


def test_weights_multiply_their_loss_only():
    targets = [NONE, MANY]
    plain = make_criterion()(make_outputs(targets), targets)
    weighted = make_criterion(weights={"class": 3.0, "mask_dice": 0.0})(make_outputs(targets), targets)
    assert list(plain) == NAMES
    for name in NAMES:
        factor = {"class": 3.0, "mask_dice": 0.0}.get(name, 1.0)
        assert weighted[name].item() == pytest.approx(factor * plain[name].item())


def test_numbers_and_order_of_instances_do_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.tensor([100, 2, 9, 31])
    label = MANY["label"].clone()
    for before, after in zip(MANY["ids"].tolist(), renamed.tolist(), strict=True):
        label[MANY["label"] == before] = after
    turned = {
        "label": label,
        "ids": renamed[order],
        "boxes": MANY["boxes"][order],
        "classes": MANY["classes"][order],
    }
    outputs = make_outputs([NONE, MANY])
    place = torch.cat([order.argsort(), torch.tensor([-1])])  # index -1 stays background
    moved = outputs | {key: place[outputs[key]] for key in ("roi_matched", "mask_matched")}
    criterion = make_criterion(num_anchor_samples=40)
    torch.manual_seed(0)
    wanted = criterion(outputs, [NONE, MANY])
    torch.manual_seed(0)
    found = criterion(moved, [NONE, turned])
    for name in NAMES:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.parametrize("targets", [[NONE], [NONE, NONE], [NONE, MANY], [MANY]])
def test_every_loss_is_attached_to_its_outputs(targets):
    outputs = make_outputs(targets)
    inputs = [outputs[k] for k in ("objectness", "anchor_deltas", "class_logits", "roi_deltas", "mask_logits")]
    losses = make_criterion()(outputs, targets)
    assert all(v.requires_grad and v.ndim == 0 and torch.isfinite(v) for v in losses.values())
    gradients = torch.autograd.grad(sum(losses.values()), inputs)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_an_image_that_is_all_ignored_costs_nothing():
    target = make_target([], [], [], ignore=[(0, 0, 0, *SIZE)])
    outputs = make_outputs([target])
    for key in ("rois", "roi_batch", "roi_matched", "class_logits", "roi_deltas"):  # the model samples no RoI there
        outputs[key] = outputs[key][:0]
    losses = make_criterion()(outputs, [target])
    assert [losses[name].item() for name in NAMES] == [0.0] * 6
    sum(losses.values()).backward()
    assert not outputs["objectness"].grad.any()


def test_ignored_voxels_have_no_gradient():
    """A slab that is ignored: the anchors centred in it, and the mask bins that touch it, do not matter."""
    target = MANY
    outputs = make_outputs([target])
    sum(make_criterion()(outputs, [target]).values()).backward()
    centre = ((outputs["anchors"][:, :3] + outputs["anchors"][:, 3:]) / 2).long()
    ignored = target["label"][centre[:, 0], centre[:, 1], centre[:, 2]] == -1
    quiet = outputs["objectness"].grad[0] == 0
    assert ignored.any()
    assert not quiet.all()
    matcher = IoUMatcher(foreground_iou=0.5, background_iou=0.25, match_best=True)
    foreground = matcher(outputs["anchors"], target["boxes"]) >= 0
    assert quiet[ignored & ~foreground].all()
    # RoI 2 (id 40) reaches into the ignored corner z 4..8, y 12..16, x 8..12.
    gradient = outputs["mask_logits"].grad[2, 1]
    box = outputs["mask_rois"][2]
    bins = [box[a] + (box[a + 3] - box[a]) * (torch.arange(GRID[a]) + 0.5) / GRID[a] for a in range(3)]
    inside = [(b >= low) & (b < high) for b, low, high in zip(bins, (4, 12, 8), (8, 16, 12), strict=True)]
    corner = inside[0][:, None, None] & inside[1][:, None] & inside[2]
    assert corner.any()
    assert not gradient[corner].any()
    assert gradient.any()


def test_unknown_weight_is_named():
    with pytest.raises(ValueError, match=r"mask_bec.*choose from"):
        make_criterion(weights={"mask_bec": 1.0})
