"""What DeepSpeed costs where it shares nothing out: the engine with ZeRO 0 against the engine without, by turns."""

from bench.engine.bars import Row
from bench.engine.bundle import LONG_MINUTES, Options, read_bundle
from bench.engine.engine import EPOCHS, NUM_WARMUP, STEPS_A_TURN, TURNS
from bench.engine.processes import in_processes
from bench.engine.turns import compare, engine_run, take_turns

METHOD = (
    "ZeRO 0: the same run of the engine with the overlay deepspeed_zero0 against that without, one process, the same "
    "turns; losses differ by the rounding of clipped gradients."
)


def measure(options: Options) -> list[Row]:
    """One row: times with DeepSpeed and without, and how far the losses are apart."""
    return in_processes(1, options.threads, options.folder, measure_here, options)


def measure_here(options: Options) -> Row:
    """What `measure` measures, in this process."""
    warmup, steps, turns = (1, 2, 1) if options.is_quick else (NUM_WARMUP, STEPS_A_TURN, TURNS)
    changes = {"max_minutes": LONG_MINUTES, "train#trainer#max_epochs": EPOCHS}
    without = engine_run(read_bundle(options, "without", changes=changes))
    zero0 = engine_run(read_bundle(options, "zero0", overlays=["deepspeed_zero0"], changes=changes))
    take_turns([zero0, without], 1, warmup)
    take_turns([zero0, without], turns, steps)
    return {"changed_ids": sorted(changes), "threads": options.threads, **compare(zero0, without, warmup)}
