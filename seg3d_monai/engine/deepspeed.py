"""DeepSpeed in the place of `Replicas`: optimizer state, gradients and weights are shared out among the processes.

DeepSpeed (Rajbhandari et al. 2020, "ZeRO") trains a copy of the network. The config's own network stays a plain module,
which receives the weights, gathered from all processes, before it is validated or saved: predictors and files know
nothing of DeepSpeed, and a checkpoint is the one that `Replicas` writes. It goes on with any number of processes, any
ZeRO stage, and without DeepSpeed.

DeepSpeed is imported in this file only, and in functions only. The file must not know models or data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seg3d_monai.engine.average import TensorAverage
from seg3d_monai.engine.replicas import num_processes, rank
from seg3d_monai.engine.zero_flats import flats_of

__all__ = ["DeepSpeedReplicas", "fill_settings"]

AUTO = "auto"
KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "fp16", "bf16"),
    *("activation_checkpointing", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "seed", "aio", "data_types"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "timers", "disable_allgather"),
    "python_gc",
)
"""Top-level keys that DeepSpeed reads and that mean something here."""
REFUSED = {
    "optimizer": "the bundle's `optimizer` is used",
    "scheduler": "the trainer's `schedule` is used",
    "torch_autocast": "`amp` says in which precision the network computes",
    "checkpoint": "the handler `Checkpoints` saves",
    "amp": "`amp` of the trainer says in which precision the network computes",
}


def fill_settings(
    settings: Mapping[str, Any],
    amp_type: torch.dtype | None,
    accumulation_steps: int,
    clip_norm: float | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """DeepSpeed's settings, with "auto", or nothing, replaced by what the bundle says.

    Args:
        settings: DeepSpeed's JSON.
        amp_type: type the network computes in; None for float32. `bf16` and `fp16` of the settings, which also keep
            the weights in it, are enabled by "auto" where it is theirs.
        accumulation_steps: batches an optimizer step in a process.
        clip_norm: largest gradient norm of a step, or None.
        batch_size: images a batch, or None where the loader does not say.

    Raises:
        ValueError: for a key that is unknown or that the bundle decides, numbers that contradict the bundle's or each
            other, and what does not go together.
    """
    for key in settings:
        if key in REFUSED:
            raise ValueError(f"deepspeed#{key} is not used: {REFUSED[key]}; remove it")
        if key not in KEYS:
            raise ValueError(f"deepspeed#{key} is unknown; {_nearest(key, KEYS)}")
    filled: dict[str, Any] = deepcopy(dict(settings))
    size, processes = batch_size or 1, num_processes()
    own = {
        "train_micro_batch_size_per_gpu": (size, "batch_size"),
        "gradient_accumulation_steps": (accumulation_steps, "accumulation_steps"),
        "gradient_clipping": (clip_norm or 0.0, "clip_norm"),
        "train_batch_size": (size * accumulation_steps * processes, ""),
    }
    for key, (value, name) in own.items():
        given = filled.setdefault(key, AUTO)
        if given == AUTO:
            filled[key] = value
        elif given != value:
            product = f"batch_size {size} x accumulation_steps {accumulation_steps} x {processes} processes = {value}"
            is_what = f"{name} is {value}" if name else f"the bundle trains with {product}"
            raise ValueError(f"deepspeed#{key} is {given} and {is_what}; write 'auto', or change one of them")
    zero = filled.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed#zero_optimization#stage is {stage!r}; choose 0, 1, 2 or 3")
    for part in ("offload_param", "offload_optimizer"):
        if zero.get(part, {}).get("device") == "nvme":
            raise ValueError(f"deepspeed#zero_optimization#{part}: weights on nvme cannot be saved; choose 'cpu'")
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = filled.get(key, {})
        if half.get("enabled") == AUTO:
            half["enabled"] = amp_type == dtype
        if half.get("enabled") and amp_type != dtype:
            raise ValueError(f"deepspeed#{key} is enabled, but amp is not {key}; set amp='{key}' or write 'auto'")
        if half.get("enabled") and stage == 0:
            raise ValueError(f"deepspeed#{key} with ZeRO stage 0 has no float32 weights to save; choose stage 1 to 3")
    if amp_type == torch.float16 and not filled.get("fp16", {}).get("enabled"):
        raise ValueError("amp='fp16' needs DeepSpeed to scale the losses; add deepspeed#fp16#enabled='auto'")
    if "bf16" in filled:
        filled["bf16"].setdefault("check_grad_overflow", True)  # a step that is not finite has to be left out
    for key, value in (("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", False)):
        if filled.get(key, AUTO) == AUTO:
            filled[key] = value
    filled.setdefault("steps_per_print", 2**31)
    return filled


def check_sections(settings: Mapping[str, Any]) -> None:
    """Refuse an unknown key within a section: DeepSpeed ignores it, or names it without the one that was meant.

    Args:
        settings: DeepSpeed's JSON.

    Raises:
        ValueError: naming the key and the nearest valid one.
    """
    for section, keys in _section_keys().items():
        part: Any = settings
        for name in section.split("#"):
            part = part.get(name) or {}
        for key in part.keys() - keys:
            raise ValueError(f"deepspeed#{section}#{key} is unknown; {_nearest(key, keys)}")


class DeepSpeedReplicas:
    """A network that DeepSpeed trains, with the face of `Replicas`; every process calls every method.

    Args:
        network: on its device; the same weights in every process. It is not trained itself.
        optimizer: over the network's parameters and without a state; it is given those of the trained copy.
        settings: as `fill_settings` returns them.
        device: of the network.
        amp_type: type to compute in; None for that of the weights.

    Attributes:
        module: what is called in training, DeepSpeed's engine.

    Raises:
        ImportError: if DeepSpeed is not installed.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        device: torch.device,
        amp_type: torch.dtype | None,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        check_sections(settings)
        trained = _Computed(deepcopy(network).train(), amp_type)
        for parameter in trained.parameters():
            # DeepSpeed sends them as bytes in a row; contiguous() would leave strides of axes of length 1.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        copies = dict(zip(network.parameters(), trained.network.parameters(), strict=True))
        own_names = {p: name for name, p in network.named_parameters()}
        self._groups = [([own_names[p] for p in group["params"]], group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [copies[p] for p in group["params"]]
        self.module, self._zero, *_ = deepspeed.initialize(model=trained, optimizer=optimizer, config=settings)
        self._network = network
        self._trained = trained.network
        self._optimizer = optimizer
        self._stage = self.module.zero_optimization_stage()
        if self._stage == 3:
            _fetch_where_weights_are_read(trained)
        self._drops = False
        names = {id(p): name for name, p in trained.network.named_parameters()}
        self._flats = list(flats_of(self._stage, self._zero, optimizer, names))
        if self.module.bfloat16_enabled() or self.module.fp16_enabled():
            self._load_weights(network.state_dict())  # DeepSpeed's float32 weights begin as rounded ones

    @property
    def is_scaled(self) -> bool:
        """Whether losses are scaled: then a gradient that is not finite is an overflow, no fault."""
        return bool(self.module.fp16_enabled())

    @contextmanager
    def batch(self, *, is_first: bool, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a batch, the first or last of its optimizer step."""
        self.module.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.module.backward(loss, scale_wrt_gas=False)

    def leave_out(self, loss: Tensor, *, is_last: bool) -> None:
        """Go on without the gradients of a loss; the last batch of a step takes the whole step with it.

        DeepSpeed closes a step in the backward pass of its last batch, and drops a step with gradients that are not
        finite in all processes: so they are made that.
        """
        if is_last:
            self._drops = True
            self.module.backward(loss * torch.nan, scale_wrt_gas=False)

    def step(self, clip_norm: float | None) -> Tensor | None:
        """Take an optimizer step, clipped as DeepSpeed's settings say; left out where gradients are not finite.

        Returns:
            Norm of all gradients together, before clipping; None where the step was to be left out.
        """
        drops, self._drops = self._drops, False
        if self._stage == 0:
            gradients = [p.grad for p in self._trained.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if not norm.isfinite():
                self.module.zero_grad()
                return None if drops else norm
        self.module.step()
        if self._stage > 0:
            norm = torch.as_tensor(self.module.get_global_grad_norm())
        return None if drops else norm

    def average(self, decay: float) -> TensorAverage:
        """An average of the weights that this process holds, as they are now."""
        return TensorAverage([flat.weights for flat in self._flats], decay)

    @contextmanager
    def evaluated(self, average: TensorAverage | None) -> Iterator[None]:
        """Give the network the averaged weights, or else the trained ones, gathered from all processes."""
        own = dict(self._network.named_parameters())
        with torch.no_grad():
            for name, value in self._whole(self._held(average)):
                own[name].copy_(value)
            for mine, trained in zip(self._network.buffers(), self._trained.buffers(), strict=True):
                mine.copy_(trained)
                if num_processes() > 1:
                    dist.broadcast(mine, 0)  # as DistributedDataParallel: the first process's moments
        yield

    def state(self, average: TensorAverage | None) -> dict[str, Any]:
        """What `Replicas.state` gives, float32; the tensors in the first process only."""
        buffers = dict(self._trained.named_buffers())
        weights = {"network": self._held(None)} | ({"ema": self._held(average)} if average else {})
        state: dict[str, Any] = {"ema": None}
        for key, held in weights.items():
            named = dict(self._kept(held))
            state[key] = {
                name: named.get(name, buffers.get(name, value)) for name, value in self._network.state_dict().items()
            }
        state["optimizer"] = self._optimizer_state()
        scaler = getattr(self._zero, "loss_scaler", None) if self.is_scaled else None
        state["grad_scaler"] = {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else {}
        return state

    def load(self, state: dict[str, Any], average: TensorAverage | None) -> None:
        """Take over what `state` gave, or that of `Replicas`, in processes of any number.

        Raises:
            RuntimeError, ValueError: if it is of another network or optimizer.
        """
        self._network.load_state_dict(state["network"])
        groups = state["optimizer"]["param_groups"]
        if [len(group["params"]) for group in groups] != [len(names) for names, _ in self._groups]:
            raise ValueError("the optimizer's groups have other numbers of parameters")
        self._load_weights(state["network"])
        with torch.no_grad():
            if average is not None:
                for flat, averaged in zip(self._flats, average.averages, strict=True):
                    averaged.copy_(flat.share(state["ema"]))
        for saved, (_, group) in zip(groups, self._groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self._load_optimizer_state(state["optimizer"]["state"])
        if self.is_scaled and state["grad_scaler"]:
            vars(self._zero.loss_scaler).update(state["grad_scaler"])

    def _held(self, average: TensorAverage | None) -> Sequence[Tensor]:
        return [flat.weights for flat in self._flats] if average is None else average.averages

    def _whole(self, held: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter, of what each process holds for each flat."""
        for flat, part in zip(self._flats, held, strict=True):
            yield from flat.split(flat.gather(part, self.module.device))

    def _kept(self, held: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The same in the first process, on the CPU; nothing in the others."""
        for name, value in self._whole(held):
            if rank() == 0:
                yield name, value.cpu().clone()

    def _numbers(self) -> dict[str, int]:
        """Parameters as torch counts them in the state of an optimizer."""
        return {name: number for number, name in enumerate(name for names, _ in self._groups for name in names)}

    def _optimizer_state(self) -> dict[str, Any]:
        numbers, state = self._numbers(), {}
        known = [self._optimizer.state.get(flat.weights, {}) for flat in self._flats]
        for flat, values in zip(self._flats, known, strict=True):
            for piece in flat.pieces if values else ():
                state[numbers[piece.name]] = {
                    key: value.clone() if torch.is_tensor(value) and value.ndim == 0 else value
                    for key, value in values.items()
                }
            for key, value in values.items():
                if torch.is_tensor(value) and value.ndim > 0:
                    for name, whole in flat.split(flat.gather(value, self.module.device)):
                        state[numbers[name]][key] = whole.cpu().clone() if rank() == 0 else None
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": [numbers[n] for n in names]}
            for names, group in self._groups
        ]
        return {"state": state, "param_groups": groups}

    def _load_optimizer_state(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        numbers = self._numbers()
        for flat in self._flats:
            # A parameter that never had a gradient has no state: that of the others, with zeros.
            of_pieces = {piece.name: state.get(numbers[piece.name], {}) for piece in flat.pieces}
            known = next(filter(None, of_pieces.values()), {})
            for key, value in known.items():
                if torch.is_tensor(value) and value.ndim > 0:
                    named = {p.name: of_pieces[p.name].get(key, torch.zeros(p.shape)) for p in flat.pieces}
                    value = flat.share(named).to(flat.weights)
                self._optimizer.state[flat.weights][key] = value.clone() if torch.is_tensor(value) else value

    @torch.no_grad()
    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for flat in self._flats:
            flat.weights.copy_(flat.share(weights))
        if self._stage == 3:
            for low, high in zip(
                self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat, strict=True
            ):
                low.copy_(high)
        for name, parameter in self._trained.named_parameters():
            if parameter.numel() == weights[name].numel():  # none where ZeRO 3 has only its share
                parameter.data.copy_(weights[name])
        for name, buffer in self._trained.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])


class _Computed(nn.Module):
    """A network that computes under autocast, which DeepSpeed would turn off around it."""

    def __init__(self, network: nn.Module, amp_type: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        self.amp_type = amp_type

    def forward(self, images: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(images.device.type, self.amp_type, enabled=self.amp_type is not None):
            return self.network(images, *arguments, **named)


class _IfWeightsAreRead:
    """A function of DeepSpeed around a module's backward pass, left out where the module itself reads no weights.

    Args:
        module: of the trained network.
        function: what fetches or releases its weights; an autograd function on its outputs or inputs.
    """

    def __init__(self, module: Any, function: Any) -> None:
        self._module = module
        self._function = function
        self._has_weights = any(True for _ in module.parameters(recurse=False))

    def apply(self, tensor: Tensor) -> Tensor:
        reads = self._has_weights or any(self._module.ds_external_parameters())
        result: Tensor = self._function.apply(tensor) if reads else tensor
        return result


def _fetch_where_weights_are_read(trained: nn.Module) -> None:
    """Let ZeRO 3 follow the backward pass through those modules only that have weights to fetch.

    It wants the same order in every process, with an entry for each output of a module, and which outputs a network has
    may depend on its images: those of denoising queries are there with instances only.
    """
    for module in trained.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            setattr(module, name, _IfWeightsAreRead(module, getattr(module, name)))


def _nearest(key: str, keys: Iterable[str]) -> str:
    """Which key was meant, or which there are."""
    near = get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"the nearest valid key is {near[0]!r}" if near else f"valid keys: {', '.join(sorted(keys))}"


def _section_keys() -> dict[str, set[str]]:
    """Keys of each section, as the installed DeepSpeed reads them; nothing where it keeps them elsewhere."""
    try:
        from deepspeed.comm.config import CommsLoggerConfig
        from deepspeed.monitor.config import DeepSpeedMonitorConfig
        from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
        from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.offload_config import (
            DeepSpeedZeroOffloadOptimizerConfig,
            DeepSpeedZeroOffloadParamConfig,
        )
    except ImportError:
        return {}
    monitors = ("tensorboard", "wandb", "csv_monitor", "comet")
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization#offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization#offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        **{name: DeepSpeedMonitorConfig.model_fields[name].annotation for name in monitors},
    }
    found = {
        section: {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        for section, model in models.items()
    }
    plain = {
        "activation_checkpointing": ACT_CHKPT_DEFAULT,
        "aio": AIO_DEFAULT_DICT,
        "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
    }
    return found | {section: set(keys) for section, keys in plain.items()}


def _import_deepspeed(device: torch.device) -> Any:
    """The module `deepspeed`, ready for the processes that are there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0" if device.index is None else str(device.index))
    level = logging.getLogger("DeepSpeed").level
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            'settings of DeepSpeed need deepspeed; pip install "seg3d_monai[cluster]", or leave them out',
            name="deepspeed",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(max(level, logging.WARNING))
    # On CPUs DeepSpeed compiles an operator for this the first time, which takes minutes; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    return deepspeed
