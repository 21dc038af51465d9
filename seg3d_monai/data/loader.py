"""The loader of training crops: its items depend on (seed, epoch, position) only, whatever the workers or ranks.

Hence it can begin in the middle of an epoch without reading what comes before.
Must not know: the crop index, volumes, models.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from seg3d_monai.data.freed_memory import give_back_at_once
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

    Returns:
        The same keys; "image" is [N, C, D, H, W], everything else a list of N.

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
        self.first_step = 0  # how many of this process's positions the next iteration leaves out
        self._num_samples = num_samples
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._num_replicas = num_replicas

    def __len__(self) -> int:
        return -(-self._num_samples // self._num_replicas)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, first_step = self.epoch, self.first_step  # an iteration under way keeps them
        order = np.arange(self._num_samples)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_samples)
        for step in range(first_step, len(self)):
            yield epoch, int(order[(step * self._num_replicas + self._rank) % self._num_samples])


class CropLoader(DataLoader[CropBatch]):
    """A DataLoader of crops whose items are the same whatever `num_workers` is; call `set_epoch` before each epoch.

    `state_dict` tells where an epoch stands; a loader that loads it goes on with the next batch::

        loader.load_state_dict(state)
        for epoch in range(loader.epoch, num_epochs):
            loader.set_epoch(epoch)
            for batch in loader: ...

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
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} cannot be used; give an integer >= {least}")
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
            worker_init_fn=_begin_worker,
        )
        self._epoch_sampler = sampler
        self._first_batch = 0  # of the next iteration
        self._next_batch = 0  # after those that were handed out
        self._layout = {
            "num_samples": len(dataset),
            "seed": int(getattr(dataset, "seed", 0)),
            "shuffle": shuffle,
            "batch_size": batch_size,
            "num_replicas": num_replicas,
        }

    def __iter__(self) -> Iterator[CropBatch]:  # type: ignore[override]
        self._epoch_sampler.first_step = self._first_batch * self._layout["batch_size"]
        self._next_batch, self._first_batch = self._first_batch, 0
        for batch in super().__iter__():
            self._next_batch += 1  # before it is handed out: the caller may never come back
            yield batch

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
        if epoch != self._epoch_sampler.epoch:
            self._first_batch = self._next_batch = 0
        self._epoch_sampler.epoch = int(epoch)

    def skip(self, num_batches: int) -> None:
        """Let the next iteration, of the epoch that is set, begin after so many batches, which are not read.

        Raises:
            ValueError: if `num_batches` is negative or more than an epoch has.
        """
        if not 0 <= num_batches <= len(self):
            raise ValueError(f"num_batches={num_batches} is outside 0 … {len(self)}, the batches of an epoch")
        self._first_batch = self._next_batch = int(num_batches)

    def state_dict(self) -> dict[str, int | bool]:
        """Where the current iteration stands: JSON-able, the same in every rank and for any number of workers."""
        is_done = self._next_batch == len(self)
        epoch = self.epoch + is_done
        return {"epoch": epoch, "batch": 0 if is_done else self._next_batch, **self._layout}

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Let the next iteration go on where another loader's stood.

        Raises:
            ValueError: if that one's batches were others: it had other samples, ranks or another seed or order.
        """
        for name, value in self._layout.items():
            if state.get(name) != value:
                raise ValueError(
                    f"the state is of a loader with {name}={state.get(name)}, this one has {value}; its batches are "
                    "others: make the loader as it was, or begin the epoch anew"
                )
        self.set_epoch(int(state["epoch"]))
        self.skip(int(state["batch"]))


def _begin_worker(_: int) -> None:
    """There may be many: each gives back what it frees, whatever it has inherited from a training process."""
    give_back_at_once()
