"""The files that a dense part can be written to, and how each is run again: torch.export, ONNX, TorchScript.

Shapes are fixed. Must not know bundles. ONNX and its runtime are imported here alone.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seg3d_monai.ops.schemas import NAMESPACE

OPSET = 20
"""The first whose GridSample takes volumes."""
INPUT = "images"
Run = Callable[[Tensor], dict[str, Tensor]]


class Format(NamedTuple):
    """write(module, images, path) and read(path, names) -> a function of images with outputs by name."""

    write: Callable[[nn.Module, Tensor, Path], None]
    read: Callable[[Path, list[str]], Run]


def file_format(path: Path) -> Format:
    """The format of a file by its ending, what it needs being there.

    Raises:
        ValueError: another ending.
        ImportError: ONNX or its runtime are not installed.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{str(path)!r} ends in {path.suffix or 'nothing'}; choose one of {', '.join(FORMATS)}")
    if path.suffix == ".onnx":
        _require_onnx()
    return FORMATS[path.suffix]


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed, and .onnx needs it; pip install 'seg3d_monai[export]'", name=error.name
        ) from error


def _exported(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, (images,), strict=False)
        except torch._dynamo.exc.UserError as error:
            raise ValueError(f"the network cannot be exported: {_reason(error)}") from error
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            _refuse_own(str(node.target.name()))
    return program


def _refuse_own(operator: str) -> None:
    if operator.startswith(f"{NAMESPACE}::"):
        raise ValueError(
            f"the network cannot be exported: its operator {operator} is one of seg3d_monai.ops, which no other "
            "runtime knows, and has no plain form of fixed shape"
        )


def _write_pt2(module: nn.Module, images: Tensor, path: Path) -> None:
    with _quiet():
        torch.export.save(_exported(module, images), path)


def _read_pt2(path: Path, names: list[str]) -> Run:
    with _quiet():
        run: Run = torch.export.load(path).module()
    return run


def _write_onnx(module: nn.Module, images: Tensor, path: Path) -> None:
    from onnxscript import opset20

    def grid_sampler(input: Any, grid: Any, mode: int, padding: int, align_corners: bool) -> Any:
        """aten::grid_sampler of volumes; the exporter's own is for images, and names the mode as older opsets do."""
        assert mode == padding == 0
        return opset20.GridSample(input, grid, mode="linear", padding_mode="zeros", align_corners=int(align_corners))

    program = _exported(module, images)
    with _quiet(), torch.no_grad():
        names = list(module(images))
        try:
            found = torch.onnx.export(
                program,
                (images,),
                input_names=[INPUT],
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                custom_translation_table={torch.ops.aten.grid_sampler.default: grid_sampler},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"the network cannot be written as ONNX: {_reason(error)}") from error
        assert found is not None
        found.save(path, external_data=False)


def _read_onnx(path: Path, names: list[str]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, Tensor]:
        found = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

    return run


def _write_ts(module: nn.Module, images: Tensor, path: Path) -> None:
    with _quiet(), torch.no_grad():
        # Not traced twice to see whether both graphs agree: the file is run and compared instead.
        traced = torch.jit.trace(module, (images,), strict=False, check_trace=False)
        for operator in re.findall(rf"{NAMESPACE}::\w+", str(traced.inlined_graph)):
            _refuse_own(operator)
        torch.jit.save(traced, path)


def _read_ts(path: Path, names: list[str]) -> Run:
    with _quiet():
        run: Run = torch.jit.load(path)
    return run


FORMATS: Mapping[str, Format] = {
    ".pt2": Format(_write_pt2, _read_pt2),
    ".onnx": Format(_write_onnx, _read_onnx),
    ".ts": Format(_write_ts, _read_ts),
}


def _reason(error: BaseException) -> str:
    """What is at the root of an exporter's errors, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks: fixed shapes are meant, and results are compared."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
