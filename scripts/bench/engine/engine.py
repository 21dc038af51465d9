"""What the engine costs: the trainer's run with the bundle's handlers against a plain loop, by turns in one process."""

from bench.engine.bars import Row
from bench.engine.bundle import LONG_MINUTES, Options, read_bundle
from bench.engine.processes import in_processes
from bench.engine.turns import compare, engine_run, plain_loop, take_turns

NUM_WARMUP, STEPS_A_TURN, TURNS = 10, 5, 22
EPOCHS = 2
METHOD = (
    "Engine: InstanceTrainer's own run, from the bundle's configuration with every handler but validation, against a "
    "plain loop over the same network, loader, criterion and optimizer. Autocast, the schedule of learning rates, "
    "clipping and averaged weights are the training's mathematics: the loop does them too, by hand, with torch's "
    "functions; it seeds the draws alike, so that its losses have to be the same. Both have the memory allocator's "
    f"settings of the engine. Turns of {STEPS_A_TURN} steps in changing order after {NUM_WARMUP} steps of each; the "
    "ratio is the median of the ratios of steps on the same crops. A step includes the loader."
)


def measure(options: Options) -> list[Row]:
    """One row: times of the engine and of the loop, and whether the losses are the same."""
    return in_processes(1, options.threads, options.folder, measure_here, options)


def measure_here(options: Options) -> Row:
    """What `measure` measures, in this process."""
    warmup, steps, turns = (1, 2, 1) if options.is_quick else (NUM_WARMUP, STEPS_A_TURN, TURNS)
    changes = {"max_minutes": LONG_MINUTES, "train#trainer#max_epochs": EPOCHS}
    engine = engine_run(read_bundle(options, "engine", changes=changes))
    plain = plain_loop(read_bundle(options, "plain", changes=changes))
    take_turns([engine, plain], 1, warmup)
    take_turns([engine, plain], turns, steps)
    return {"changed_ids": sorted(changes), "threads": options.threads, **compare(engine, plain, warmup)}
