"""Small volumes with touching cells of several classes, ids with gaps and ignored voxels; anisotropic, no cubes."""

import torch

SIZE = (6, 10, 14)
STRIDE = (1, 2, 2)
GRID = (6, 5, 7)


def make_target(boxes, classes, ids, ignore=(), size=SIZE):
    label = torch.zeros(size, dtype=torch.int64)
    for (z1, y1, x1, z2, y2, x2), number in zip(boxes, ids, strict=True):
        label[z1:z2, y1:y2, x1:x2] = number
    for z1, y1, x1, z2, y2, x2 in ignore:
        label[z1:z2, y1:y2, x1:x2] = -1
    return {
        "label": label,
        "ids": torch.tensor(ids, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6),
        "classes": torch.tensor(classes, dtype=torch.int64),
    }


MANY = make_target(
    [(0, 0, 0, 3, 4, 6), (0, 0, 6, 3, 5, 10), (3, 4, 0, 6, 10, 5), (4, 5, 7, 6, 8, 13)],
    [0, 2, 1, 0],
    [7, 3, 40, 5],
    ignore=[(0, 6, 8, 2, 10, 14), (2, 3, 4, 4, 6, 6)],
)
ONE = make_target([(1, 2, 3, 4, 6, 11)], [1], [9])
NONE = make_target([], [], [])
EMPTY_AND_IGNORED = make_target([], [], [], ignore=[(0, 0, 0, 3, 10, 14)])


def crowd(count=300, size=SIZE):
    """As many cells of one voxel as asked for, in row-major order."""
    corners = torch.nonzero(torch.ones(size))[:count]
    target = make_target([], [], [])
    target["label"] = torch.zeros(size, dtype=torch.int64)
    target["label"].view(-1)[:count] = torch.arange(1, count + 1)
    target["ids"] = torch.arange(1, count + 1)
    target["boxes"] = torch.cat([corners, corners + 1], 1).float()
    target["classes"] = torch.arange(count) % 3
    return target


def draw_predictions(num_layers, targets, num_queries, *, num_logits=3, channels=5, seed=0, dtype=torch.float64):
    """Leaves that ask for gradients: logits, embeds, boxes within the crop, mask features."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, len(targets), num_queries)

    def normal(*sizes, scale=1.0):
        return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    size = torch.tensor(SIZE, dtype=torch.float64)
    lower = torch.rand(*shape, 3, generator=generator, dtype=torch.float64) * size * 0.7
    extent = 0.5 + torch.rand(*shape, 3, generator=generator, dtype=torch.float64) * size * 0.5
    return {
        "class_logits": normal(*shape, num_logits),
        "mask_embeds": normal(*shape, channels),
        "boxes": torch.cat([lower, lower + extent], -1).to(dtype).requires_grad_(),
        "mask_features": normal(len(targets), channels, *GRID),
    }
