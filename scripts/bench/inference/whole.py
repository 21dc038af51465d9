"""A whole stack's time against that of reading its blocks and running the network on them, and nothing else.

The machine's speed may drift by more within minutes than what is to be measured, so both are measured at the same time:
a predictor around the bundle's own halts the run after every few blocks, and while it stands reads these blocks again
and runs the bare network on them, in the same thread, with the same weights, threads, autocast and inference mode. The
halts are taken off the run's time. Drift that is slower than a halt follows the last one hits both alike.

The run may read or pack other blocks in the background. A halt would hide such work, so it begins only when the process
has come to rest, and the waiting counts as the run's time. That errs against the run: without halts, some of that work
would overlap the network.

The run tells the C library to keep the memory that is freed, and what is measured in its halts gains by that too. What
a plain loop over the blocks takes, as somebody else would write it, is measured as well, after the run: in a fresh
process, without the package's rules, on a few of the blocks.

What counts as the run is all of `predict_volume`: the input's and the weights' digests, intensity statistics, reading,
normalising, the network, pasting masks, the journal, stitching, painting, the pyramid, the table.
"""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.inference.bars import Row
from bench.inference.model import read_predictor, write_specimen_stack
from bench.inference.options import Options
from bench.inference.stacks import SPACING_UM
from bench.inference.tissue import Roi
from seg3d_monai.data.volume import Volume, open_volume
from seg3d_monai.inference import InstancePredictor, Instances, predict_volume
from seg3d_monai.inference.blocks import BlockPlan, roi_shape

SHAPE, BLOCKS_BETWEEN_HALTS = (256, 1152, 1152), 8
QUICK_SHAPE, QUICK_BLOCKS_BETWEEN_HALTS = (24, 72, 72), 3
PLAIN_STEP = 7  # every so many blocks are measured in a plain loop; it divides no number of blocks along an axis
METHOD = (
    f"Whole stack: after every {BLOCKS_BETWEEN_HALTS} blocks the run stands still while the same blocks are read and "
    "run through the bare network, in the same thread and settings; whole is all of predict_volume less these halts, "
    "the wait for background work before a halt included; bare is the sum of the reads and forward passes. Plain: "
    "reads and forward passes in the main thread of a fresh process that leaves the C library as it is, of one block "
    f"in {PLAIN_STEP}, after one more, scaled to all blocks by their voxels."
)
_REST_S, _REST_SHARE, _MOST_WAIT_S = 0.05, 0.1, 60.0


class HaltingPredictor:
    """The bundle's predictor, which halts the run now and then to measure the bare network.

    Args:
        predictor: of the bundle.
        blocks_between_halts: how many blocks a halt measures.
    """

    def __init__(self, predictor: InstancePredictor, blocks_between_halts: int) -> None:
        self._predictor = predictor
        self._blocks_between_halts = blocks_between_halts
        self._waiting: list[Roi] = []
        self.num_found: list[int] = []
        self.halted_s = self.predictor_s = self.last_call = 0.0
        self.read_s: list[float] = []
        self.forward_s: list[float] = []

    def for_volume(self, volume: Volume) -> "HaltingPredictor":
        """Bind the predictor to the volume."""
        self._volume = volume
        self._predictor = self._predictor.for_volume(volume)
        return self

    def identity(self) -> dict[str, Any]:
        """That of the predictor."""
        return self._predictor.identity()

    def __call__(self, block: Tensor, roi: Roi) -> Instances:
        """The predictor's instances of a block."""
        start = time.perf_counter()
        found = self._predictor(block, roi)
        self.predictor_s += time.perf_counter() - start
        self.num_found.append(len(found))
        self._waiting.append(roi)
        if len(self._waiting) == self._blocks_between_halts:
            self.halt()
        self.last_call = time.perf_counter()
        return found

    def halt(self) -> None:
        """Measure the blocks that came since the last halt."""
        start = _wait_for_rest()
        for roi in self._waiting:
            self.measure(roi)
        self._waiting.clear()
        self.halted_s += time.perf_counter() - start

    @torch.inference_mode()
    def measure(self, roi: Roi) -> None:
        """Seconds to read a block and of a forward pass on it."""
        predictor, network = self._predictor, self._predictor.network.eval()
        assert predictor.intensity is not None
        start = time.perf_counter()
        voxels = self._volume.read(roi)
        self.read_s.append(time.perf_counter() - start)
        image = torch.from_numpy(predictor.intensity.normalise(voxels))[None]
        with torch.autocast("cpu", dtype=predictor.amp, enabled=predictor.amp is not None):
            start = time.perf_counter()
            network(image)
            self.forward_s.append(time.perf_counter() - start)


def plain_seconds(stack: Path, checkpoint: Path | None, threads: int, is_quick: bool) -> float:
    """Seconds that a plain loop over all blocks would take in this process."""
    torch.set_num_threads(threads)
    bundle_predictor, cut = read_predictor(checkpoint, is_quick)
    volume = open_volume(stack, spacing=SPACING_UM)
    meter = HaltingPredictor(bundle_predictor, 0).for_volume(volume)
    rois = [block.read for block in BlockPlan.make(shape=volume.shape[1:], **cut)]
    meter.measure(rois[0])  # warms up
    meter.read_s, meter.forward_s = [], []
    measured = rois[::PLAIN_STEP]
    for roi in measured:
        meter.measure(roi)
    share = sum(prod(roi_shape(roi)) for roi in measured) / sum(prod(roi_shape(roi)) for roi in rois)
    return (sum(meter.read_s) + sum(meter.forward_s)) / share


def _wait_for_rest() -> float:
    """Wait until no thread of this process computes; the time from which on that was so."""
    until = time.perf_counter() + _MOST_WAIT_S
    while True:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(_REST_S)
        if time.process_time() - used < _REST_SHARE * _REST_S or start > until:
            return start


def measure(options: Options) -> list[Row]:
    """One row: the whole stack and the bare network."""
    folder, is_quick = options.folder, options.is_quick
    shape = QUICK_SHAPE if is_quick else SHAPE
    stack = write_specimen_stack(folder / "whole_stack.zarr", shape, is_quick)
    bundle_predictor, cut = read_predictor(options.checkpoint, is_quick)
    predictor = HaltingPredictor(bundle_predictor, QUICK_BLOCKS_BETWEEN_HALTS if is_quick else BLOCKS_BETWEEN_HALTS)
    start = time.perf_counter()
    arguments = {"spacing": SPACING_UM, "progress": sys.stderr.isatty(), **cut}
    done = predict_volume(stack, predictor, folder / "whole.zarr", **arguments)
    end = time.perf_counter()
    whole_s = end - start - predictor.halted_s
    predictor.halt()  # the blocks since the last halt
    bare_s = sum(predictor.read_s) + sum(predictor.forward_s)
    assert len(predictor.forward_s) == len(predictor.num_found)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        job = fresh_process.submit(plain_seconds, stack, options.checkpoint, options.threads, is_quick)
        plain_s = job.result()
    return [
        {
            "model": "maskrcnn3d",
            "shape": shape,
            "voxels": shape[0] * shape[1] * shape[2],
            **cut,
            "autocast": str(bundle_predictor.amp),
            "num_blocks": len(predictor.num_found),
            "instances_of_blocks": predictor.num_found,
            "num_objects": done.num_objects,
            "whole_s": whole_s,
            "bare_s": bare_s,
            "bare_read_s": sum(predictor.read_s),
            "bare_forward_s": sum(predictor.forward_s),
            "predictor_s": predictor.predictor_s,
            "after_last_block_s": end - predictor.last_call,
            "forward_runs_s": predictor.forward_s,
            "plain_s": plain_s,
            "times_bare": whole_s / bare_s,
            "times_plain": whole_s / plain_s,
        }
    ]
