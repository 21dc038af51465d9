"""The loader of training crops: its items depend on (seed, epoch, position) only, whatever the workers or ranks.

Must not know: the crop index, volumes, models.
"""

from collections.abc import Iterator, Sequence, Sized
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from seg3d_monai.data.targets import Targets


class CropBatch(TypedDict):
    """N crops.

    image: float32 [N, C, D, H, W].
    targets: one per crop.
    crop_id, volume, roi: one per crop.
    """

    image: torch.Tensor
    targets: list[Targets]
    crop_id: list[int]
    volume: list[str]
    roi: list[tuple[int, ...]]


def collate_crops(samples: Sequence[Any]) -> CropBatch:
    """Stack the images of crops and list everything else.

    Args:
        samples: crops of equal shape, at least one.

    Raises:
        ValueError: if there is none, or their shapes differ.
    """
    shapes = sorted({tuple(sample["image"].shape) for sample in samples})
    if len(shapes) != 1:
        raise ValueError(f"crops have shapes {shapes}; a batch needs crops of one shape")
    return CropBatch(
        image=torch.stack([sample["image"] for sample in samples]),
        targets=[sample["targets"] for sample in samples],
        crop_id=[sample["crop_id"] for sample in samples],
        volume=[sample["volume"] for sample in samples],
        roi=[sample["roi"] for sample in samples],
    )


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, position); the order is a function of (seed, epoch).

    Args:
        num_samples: positions in an epoch, over all ranks.
        shuffle: whether to permute the positions.
        seed: of the permutation.
        rank: this process's number.
        num_replicas: number of processes; each takes every num_replicas-th position, equally many, wrapping around at
            the end.
    """

    def __init__(
        self, *, num_samples: int, shuffle: bool = False, seed: int = 0, rank: int = 0, num_replicas: int = 1
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} is outside 0 … {num_replicas - 1}; it counts from 0 below num_replicas")
        self.epoch = 0
        self._num_samples = num_samples
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._num_replicas = num_replicas

    def __len__(self) -> int:
        return -(-self._num_samples // self._num_replicas)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch  # an iteration under way keeps its epoch
        order = np.arange(self._num_samples)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_samples)
        for step in range(len(self)):
            yield epoch, int(order[(step * self._num_replicas + self._rank) % self._num_samples])


class CropLoader(DataLoader[CropBatch]):
    """A DataLoader of crops whose items are the same whatever `num_workers` is; call `set_epoch` before each epoch.

    Args:
        dataset: a `CropDataset`, or another sized dataset that takes (epoch, position).
        batch_size: crops per batch.
        num_workers: worker processes, kept between epochs; 0 loads in this process.
        shuffle: whether to permute the positions; crops are random draws already.
        drop_last: whether to leave out an incomplete last batch.
        pin_memory: whether to hand out pinned memory, for CUDA.
        prefetch_factor: batches each worker prepares ahead; 2 by default.
        rank: this process's number under distributed training.
        num_replicas: number of such processes.
        multiprocessing_context: "fork", "spawn" or "forkserver"; the platform's by default.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        rank: int = 0,
        num_replicas: int = 1,
        multiprocessing_context: str | None = None,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset={dataset!r} has no length; give a CropDataset")
        sampler = EpochSampler(
            num_samples=len(dataset),
            shuffle=shuffle,
            seed=int(getattr(dataset, "seed", 0)),
            rank=rank,
            num_replicas=num_replicas,
        )
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate_crops,
            drop_last=drop_last,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=num_workers > 0,
            multiprocessing_context=multiprocessing_context if num_workers > 0 else None,
        )
        self._epoch_sampler = sampler

    @property
    def epoch(self) -> int:
        """The epoch whose crops the next iteration yields, from 0."""
        return self._epoch_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; iterating twice without it repeats the same crops.

        Raises:
            ValueError: if `epoch` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch} is negative; epochs count from 0")
        self._epoch_sampler.epoch = int(epoch)
