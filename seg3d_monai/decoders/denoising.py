"""Contrastive denoising queries: true instances with noise, which the decoder learns to restore.

DN-DETR (Li et al. 2022) and DINO (Zhang et al. 2022): a positive query carries a slightly moved box and must find its
instance again, a negative one carries a further moved box and must say "no object". The mask part is Mask DINO's
(Li et al. 2023): a positive query must also draw its instance's mask. Must not know losses or features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

NEGATIVE = -1
PADDING = -2


@dataclass(frozen=True)
class DenoisingQueries:
    """Noised instances as queries, group after group, in a group all positives, then all negatives.

    Args:
        content: [N, T, C] embedded noised labels, zero for padding.
        boxes: float32 [N, T, 6] noised boxes, voxels.
        target_index: int64 [N, T] true instance, -1 for a negative query, -2 for padding.
        attention_mask: bool [N, Q + T, Q + T], True where a query (row) may not see another (column); the Q matching
            queries stand first. Matching queries see no denoising query, a denoising query sees its own group and the
            matching queries, nobody sees padding.
    """

    content: Tensor
    boxes: Tensor
    target_index: Tensor
    attention_mask: Tensor


class Denoising:
    """Makes denoising queries of the true instances of a batch. Draws from torch's global generator.

    Args:
        num_queries: denoising queries wanted for each image; the instances are repeated in as many groups as fit, in
            one at least.
        label_noise: probability in [0, 1] that a query's class is drawn anew, uniformly over all classes.
        box_noise: in [0, 1]. Each face of a positive's box moves by less than `box_noise` times half its extent, each
            face of a negative's by one to two times that, inwards or outwards.
        max_queries: most denoising queries of an image. In an image of more than `max_queries // 2` instances, a random
            subset of that many is denoised.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self, *, num_queries: int = 100, label_noise: float = 0.2, box_noise: float = 0.4, max_queries: int = 400
    ) -> None:
        for name, noise in (("label_noise", label_noise), ("box_noise", box_noise)):
            if not 0 <= noise <= 1:
                raise ValueError(f"{name} is {noise}; choose it between 0 and 1")
        if num_queries < 2:
            raise ValueError(f"num_queries is {num_queries}; give at least 2, or no denoising at all")
        if max_queries < num_queries:
            raise ValueError(f"max_queries is {max_queries}, less than num_queries = {num_queries}; raise it")
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.max_queries = max_queries

    def __repr__(self) -> str:
        names = ("num_queries", "label_noise", "box_noise", "max_queries")
        return f"Denoising({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def __call__(
        self, targets: Sequence[Mapping[str, Tensor]], label_embedding: nn.Embedding, num_matching: int
    ) -> DenoisingQueries | None:
        """Denoising queries of a batch.

        Args:
            targets: for each image {"boxes" [G, 6], "classes" int64 [G]}, any G.
            label_embedding: content of each foreground class; its rows are the classes.
            num_matching: Q, the matching queries that the attention mask also speaks of.

        Returns:
            The queries, T = groups * 2 * (largest G, or `max_queries // 2` where that is less); None when no image has
            an instance.
        """
        slots = min(max((len(target["classes"]) for target in targets), default=0), self.max_queries // 2)
        if slots == 0:
            return None
        groups = max(1, self.num_queries // (2 * slots))
        index, boxes, classes = _one_group(targets, slots)
        with torch.no_grad():
            real = index >= 0
            negative = torch.where(real, NEGATIVE, PADDING)
            target_index = torch.stack([index, negative], 1).repeat(1, groups, 1).flatten(1)
            noised = self._noise_boxes(boxes, groups).flatten(1, 2)
            labels = classes.repeat(1, groups * 2)
            drawn = torch.randint_like(labels, label_embedding.num_embeddings)
            change = torch.rand(labels.shape, device=labels.device) < self.label_noise
            labels = torch.where(change, drawn, labels)
            mask = _attention_mask(target_index, groups, num_matching)
        content = label_embedding(labels) * (target_index != PADDING)[..., None]
        return DenoisingQueries(content, noised, target_index, mask)

    def _noise_boxes(self, boxes: Tensor, groups: int) -> Tensor:
        """Boxes [N, G, 6] -> [N, groups * 2, G, 6], in turn with a positive's and a negative's noise."""
        half = (boxes[..., 3:] - boxes[..., :3]).repeat(1, 1, 2) / 2
        shape = (boxes.shape[0], groups, 2, *boxes.shape[1:])
        size = torch.rand(shape, device=boxes.device)
        size[:, :, 1] += 1
        sign = torch.randint(2, shape, device=boxes.device) * 2 - 1
        moved = boxes[:, None, None] + sign * size * self.box_noise * half[:, None, None]
        # Above a box noise of one half, faces of a negative can pass each other.
        first, second = moved[..., :3], moved[..., 3:]
        return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1).flatten(1, 2)


def _one_group(targets: Sequence[Mapping[str, Tensor]], slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [N, slots] of the instances (-2 padding), their boxes [N, slots, 6] and classes [N, slots]."""
    index, boxes, classes = [], [], []
    for target in targets:
        count, device = len(target["classes"]), target["boxes"].device
        if count > slots:
            rows = torch.randperm(count, device=device)[:slots].sort().values
        else:
            rows = torch.arange(count, device=device)
        index.append(rows)
        boxes.append(target["boxes"].float()[rows])
        classes.append(target["classes"][rows])
    padded = pad_sequence(index, batch_first=True, padding_value=PADDING)
    padded_boxes = pad_sequence(boxes, batch_first=True)
    # A padding box is one voxel: whatever is computed of it stays finite.
    padded_boxes[..., 3:] += (padded == PADDING)[..., None]
    return padded, padded_boxes, pad_sequence(classes, batch_first=True)


def _attention_mask(target_index: Tensor, groups: int, num_matching: int) -> Tensor:
    """Who may not see whom, bool [N, Q + T, Q + T]; see `DenoisingQueries`."""
    images, queries = target_index.shape
    group = torch.arange(queries, device=target_index.device) // (queries // groups)
    mask = torch.ones(
        (images, num_matching + queries, num_matching + queries), dtype=torch.bool, device=target_index.device
    )
    mask[:, :, :num_matching] = False
    mask[:, num_matching:, num_matching:] = (group[:, None] != group) | (target_index == PADDING)[:, None]
    return mask
