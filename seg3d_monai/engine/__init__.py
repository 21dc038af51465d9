"""Training and evaluation of instance models with Ignite and MONAI engines; see trainer.py and evaluator.py."""

from seg3d_monai.engine.checkpoint import load_weights, read_spacing, start_from
from seg3d_monai.engine.config import check_config, live_parser
from seg3d_monai.engine.evaluator import EvaluatorEvents, FinalReport, VolumeEvaluator
from seg3d_monai.engine.handlers import Checkpoints, CsvLog, EarlyStopping, Progress, Validation
from seg3d_monai.engine.launch import Launcher, join_processes
from seg3d_monai.engine.nonfinite import NonFiniteLog
from seg3d_monai.engine.optim import parameter_groups
from seg3d_monai.engine.provenance import provenance
from seg3d_monai.engine.reconstruction import ReconstructionEvaluator, ReconstructionReport
from seg3d_monai.engine.record import record_run
from seg3d_monai.engine.replicas import num_processes, rank
from seg3d_monai.engine.schedule import WarmupCosine, WarmupStableDecay
from seg3d_monai.engine.tensorboard import TensorBoard
from seg3d_monai.engine.trainer import InstanceTrainer, TrainerEvents
from seg3d_monai.engine.tuner import Tuner, check_tune_files

__all__ = [
    "Checkpoints",
    "CsvLog",
    "EarlyStopping",
    "EvaluatorEvents",
    "FinalReport",
    "InstanceTrainer",
    "Launcher",
    "NonFiniteLog",
    "Progress",
    "ReconstructionEvaluator",
    "ReconstructionReport",
    "TensorBoard",
    "TrainerEvents",
    "Tuner",
    "Validation",
    "VolumeEvaluator",
    "WarmupCosine",
    "WarmupStableDecay",
    "check_config",
    "check_tune_files",
    "join_processes",
    "live_parser",
    "load_weights",
    "num_processes",
    "parameter_groups",
    "provenance",
    "rank",
    "read_spacing",
    "record_run",
    "start_from",
]
