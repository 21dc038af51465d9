"""A whole bundle of a single convolution, small enough to be written anew for every defect."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

TENSOR = {
    "type": "image",
    "format": "fluorescence",
    "num_channels": 1,
    "spatial_shape": ["*", "*", "*"],
    "dtype": "float32",
    "value_range": [0, 1],
}
METADATA: dict[str, Any] = {
    "schema": "https://nowhere.invalid/schema.json",
    "version": "0.2.0",
    "changelog": {"0.2.0": "second", "0.1.0": "first"},
    "monai_version": "1.0.0",
    "pytorch_version": "2.0.0",
    "numpy_version": "1.26.0",
    "required_packages_version": {"fire": "0.1.0"},
    "task": "a toy",
    "description": "one convolution",
    "network_data_format": {"inputs": {"image": TENSOR}, "outputs": {"pred": TENSOR}},
}
CONV = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "properties": {"task": {"type": "string"}, "version": {"type": "string"}},
    "required": ["task", "version", "network_data_format"],
}
LOGGING = """[loggers]
keys=root
[handlers]
keys=out
[formatters]
keys=plain
[logger_root]
level=INFO
handlers=out
[handler_out]
class=StreamHandler
args=(sys.stderr,)
formatter=plain
[formatter_plain]
format=%(message)s
"""
TRAIN = {"bundle_root": "bundles/toy", "width": 1, "network_def": CONV, "run": ["$print(@width)"]}
INFERENCE = {
    "bundle_root": "bundles/toy",
    "checkpoint": "runs/model.pt",
    "threshold": 0.5,
    "network_def": CONV,
    "dense_net_def": CONV,
    "run": ["$print(@threshold)"],
}


def conv() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv3d(1, 1, 3, padding=1)


class Unscriptable(torch.nn.Module):
    """A network around another one that TorchScript can trace and not script."""

    def __init__(self, of: torch.nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = next(layer(image) for layer in [self.of])
        return found


def write_bundle(folder: Path) -> Path:
    """A bundle that passes every check."""
    files: dict[str, Any] = {
        "LICENSE": "Apache",
        "docs/README.md": "toy",
        "docs/data_license.txt": "none",
        "configs/logging.conf": LOGGING,
        "configs/metadata.json": METADATA,
        "configs/train.json": TRAIN,
        "configs/inference.json": INFERENCE,
        "configs/evaluate.json": {"wide": "@width"},
        "configs/multi_gpu_train.json": {"network_def#kernel_size": 3},
        "eval/schema.json": SCHEMA,
    }
    for name, content in files.items():
        put(folder, name, content)
    (folder / "models").mkdir()
    torch.save(conv().state_dict(), folder / "models" / "model.pt")
    return folder


def put(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    content = copy.deepcopy(json.loads((folder / name).read_text())) | values
    put(folder, name, {key: value for key, value in content.items() if value is not None})


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
