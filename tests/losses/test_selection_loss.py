"""The loss of token scores against loops in float64, and hand-counted choices of each instance's own token."""

import numpy as np
import pytest
import torch
from set_targets import MANY, NONE, ONE, SIZE, crowd, make_target

from seg3d_monai.losses.selection_loss import selection_loss, token_heat

# Two levels over 6 x 10 x 14 voxels, of (1, 2, 2) and (2, 4, 4) voxels a cell; objects of 4 and 2 cells.
GRIDS = [((6, 5, 7), (1, 2, 2)), ((3, 3, 4), (2, 4, 4))]


def make_tokens(num_images, num_classes=3, seed=0, padding=None):
    centres, extents = [], []
    for size, stride in GRIDS:
        cells = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).reshape(-1, 3)
        centres.append((cells + 0.5) * stride)
        extents.append(np.tile(4.0 * np.array(stride), (len(cells), 1)))
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(len, centres))
    logits = torch.randn(num_images, count, num_classes, generator=generator, dtype=torch.float64)
    return {
        "class_logits": logits.requires_grad_(),
        "sizes": [size for size, _ in GRIDS],
        "centres": torch.from_numpy(np.concatenate(centres)).float(),
        "extents": torch.from_numpy(np.concatenate(extents)).float(),
        "padding": padding,
    }


def heat_by_loops(tokens, target, num_classes, padding=None):
    centres, extents = tokens["centres"].double().numpy(), tokens["extents"].double().numpy()
    count = len(centres)
    counted = np.ones(count, dtype=bool)
    for s in range(count):
        voxel = tuple(min(int(c), n - 1) for c, n in zip(centres[s], SIZE, strict=True))
        counted[s] = target["label"][voxel] != -1 and not (padding is not None and padding[s])
    heat, own = np.zeros((count, num_classes)), []
    for box, k in zip(target["boxes"].double().numpy(), target["classes"].tolist(), strict=True):
        middle, extent = (box[:3] + box[3:]) / 2, box[3:] - box[:3]
        misfit = [np.abs(np.log(extent / extents[s])).sum() if counted[s] else np.inf for s in range(count)]
        level = [s for s in range(count) if misfit[s] < min(misfit) + 1e-9]
        for s in level:
            spread = (centres[s] - middle) / (extent / 6)
            heat[s, k] = max(heat[s, k], min(np.exp(-(spread**2).sum() / 2), 0.99))
        own.append((min(level, key=lambda s: (((centres[s] - middle) / extents[s]) ** 2).sum()), k))
    for s, k in own:
        heat[s, k] = 1
    return heat, counted


def loss_by_loops(tokens, targets, num_classes=3):
    total, padding = 0.0, tokens["padding"]
    for n, target in enumerate(targets):
        heat, counted = heat_by_loops(tokens, target, num_classes, None if padding is None else padding[n])
        for s in np.flatnonzero(counted):
            for k in range(num_classes):
                p = 1 / (1 + np.exp(-tokens["class_logits"][n, s, k].item()))
                if heat[s, k] == 1:
                    total -= (1 - p) ** 2 * np.log(p)
                else:
                    total -= (1 - heat[s, k]) ** 4 * p**2 * np.log(1 - p)
    return total / max(1, sum(len(target["ids"]) for target in targets))


@pytest.mark.parametrize("targets", [[MANY], [ONE, NONE, MANY], [NONE], [crowd(300), NONE]])
@pytest.mark.parametrize("is_padded", [False, True])
def test_loss_against_loops(targets, is_padded):
    padding = None
    if is_padded:
        padding = torch.zeros(len(targets), 246, dtype=torch.bool)
        padding[0, 100:150] = True
        padding[-1, 200:] = True
    tokens = make_tokens(len(targets), padding=padding)
    loss = selection_loss(tokens, targets, max(1, sum(len(t["classes"]) for t in targets)))
    assert loss.item() == pytest.approx(loss_by_loops(tokens, targets), rel=1e-5)
    loss.backward()
    assert tokens["class_logits"].grad.isfinite().all()


def test_each_instance_has_one_token_on_the_level_of_its_size():
    """A cell of (4, 8, 8) voxels belongs to the fine level, one of (6, 10, 14) to the coarse one."""
    small = make_target([(1, 1, 3, 5, 9, 11)], [2], [5])
    (heat,), counted = token_heat(make_tokens(1), [small])
    assert counted.all()
    assert (heat == 1).nonzero().tolist() == [[(2 * 5 + 2) * 7 + 3, 2]]  # cell (2, 2, 3) is centred on (2.5, 5, 7)
    assert not heat[210:].any()
    assert not heat[:, :2].any()
    large = make_target([(0, 0, 0, 6, 10, 14)], [0], [5])
    (heat,), _ = token_heat(make_tokens(1), [large])
    # Centred on (3, 5, 7): cell (1, 1, 1) of the coarse level lies at (3, 6, 6), its neighbour in x at (3, 6, 10).
    assert (heat == 1).nonzero().tolist() == [[210 + (1 * 3 + 1) * 4 + 1, 0]]
    assert not heat[:210].any()


def test_two_instances_may_share_a_token_and_classes_have_their_own_heat():
    target = make_target([(2, 4, 6, 3, 5, 7), (2, 5, 7, 3, 6, 8)], [0, 0], [1, 2])
    (heat,), _ = token_heat(make_tokens(1), [target])
    assert (heat == 1).sum() == 1
    other = {**target, "classes": torch.tensor([0, 2])}
    (heat,), _ = token_heat(make_tokens(1), [other])
    assert (heat == 1).sum(0).tolist() == [1, 0, 1]


def test_scores_on_ignored_voxels_cost_nothing():
    target = make_target([(1, 1, 1, 5, 7, 7)], [0], [5], ignore=[(0, 0, 8, 6, 10, 14)])
    tokens = make_tokens(1)
    selection_loss(tokens, [target], 1).backward()
    ignored = tokens["centres"][:, 2] >= 8
    assert not tokens["class_logits"].grad[0, ignored].any()
    assert tokens["class_logits"].grad[0, ~ignored].all()


def test_nothing_but_padding_costs_nothing():
    tokens = make_tokens(1, padding=torch.ones(1, 246, dtype=torch.bool))
    loss = selection_loss(tokens, [MANY], len(MANY["classes"]))
    loss.backward()
    assert loss.item() == 0
    assert not tokens["class_logits"].grad.any()


def test_ids_do_not_matter():
    renumbered = {
        **MANY,
        "ids": MANY["ids"] + 100,
        "label": torch.where(MANY["label"] > 0, MANY["label"] + 100, MANY["label"]),
    }
    tokens = make_tokens(1)
    assert selection_loss(tokens, [MANY], len(MANY["classes"])) == selection_loss(
        tokens, [renumbered], len(renumbered["classes"])
    )


def test_images_of_a_batch_are_held_against_their_own_instances():
    targets = [ONE, NONE, MANY]
    padding = torch.zeros(3, 246, dtype=torch.bool)
    padding[2, 30:90] = True
    batch = make_tokens(3, padding=padding)
    heat, counted = token_heat(batch, targets)
    for n, target in enumerate(targets):
        alone = {**batch, "class_logits": batch["class_logits"][n : n + 1], "padding": padding[n : n + 1]}
        wanted = token_heat(alone, [target])
        assert torch.equal(heat[n : n + 1], wanted[0])
        assert torch.equal(counted[n : n + 1], wanted[1])
