"""Checks that run what stands in a bundle: its network is built, weights put in, MONAI's own verification called.

Only for a bundle whose listing was seen by somebody who trusts it. Files are written to a temporary folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seg3d_monai.sharing.check import FAILED, NOT_CHECKED, PASSED, Check, Content, weights_file
from seg3d_monai.sharing.files import bundle_file
from seg3d_monai.sharing.metadata import METADATA
from seg3d_monai.sharing.weights import read_plain
from seg3d_monai.user_errors import one_line, user_error

FITS, IN_OUT, EXPORT = "weights fit the network", "verify_net_in_out", "ckpt_export"
NETWORK, DENSE = "network_def", "dense_net_def"
"""The network, and its face for MONAI's tools: one dense tensor in, one out."""
ANY_SIZE = 32
"""Voxels along an axis for which the metadata allows any number."""


def check_run(content: Content) -> list[Check]:
    """Build the networks of a bundle and try them.

    Args:
        content: Of a bundle that is trusted.
    """
    name = bundle_file(content.folder, "configs/inference")
    if name is None or name not in content.configs:
        return not_run("there is no configs/inference.json")
    if not isinstance(content.configs[name], Mapping):
        return not_run("configs/inference.json holds no keys")
    run = _Run(content, name)
    return [
        _tried(FITS, lambda: _fits(run)),
        _tried(IN_OUT, lambda: _verify(run)),
        _tried(EXPORT, lambda: _export(run)),
    ]


def not_run(why: str) -> list[Check]:
    """The checks of `check_run`, left out for a reason."""
    return [Check(name=name, result=NOT_CHECKED, why=why) for name in (FITS, IN_OUT, EXPORT)]


class _Run:
    """A bundle's inference configuration, its root set to where it lies."""

    def __init__(self, content: Content, name: str) -> None:
        self.content = content
        self.file = str(content.folder.resolve() / name)
        self.metadata = str(content.folder.resolve() / METADATA)
        config = content.configs[name]
        self.keys = set(config)
        self.overrides: dict[str, Any] = (
            {"bundle_root": str(content.folder.resolve())} if "bundle_root" in config else {}
        )

    def input_shape(self) -> list[int]:
        """[1, C, D, H, W] of an image that the metadata allows."""
        from monai.bundle.scripts import _get_fake_spatial_shape

        image = self.content.configs[METADATA]["network_data_format"]["inputs"]["image"]
        return [1, image["num_channels"], *_get_fake_spatial_shape(image["spatial_shape"], any=ANY_SIZE)]

    def build(self, id: str) -> nn.Module:
        from monai.bundle import ConfigParser

        parser = ConfigParser()
        parser.read_config(self.file)
        parser.update(self.overrides)
        network = parser.get_parsed_content(id)
        if not isinstance(network, nn.Module):
            raise ValueError(f"{id} is a {type(network).__name__}, not a network")
        return network.eval()


def _tried(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    try:
        with _quiet():
            result, why = check()
    except Exception as error:  # whatever the bundle does is a result, not a defect of the check
        result, why = FAILED, one_line(user_error(error) or error)
    return Check(name=name, result=result, why=why)


def _fits(run: _Run) -> tuple[str, str]:
    file = weights_file(run.content.folder)
    if file is None:
        return NOT_CHECKED, "no weights are shipped"
    if NETWORK not in run.keys:
        return NOT_CHECKED, f"configs/inference.json has no {NETWORK}"
    faults = _misfits(read_plain(file), run.build(NETWORK))
    return (FAILED, "; ".join(faults[:3])) if faults else (PASSED, "every key and shape agrees")


def _misfits(weights: dict[str, Any], network: nn.Module) -> list[str]:
    own = network.state_dict()
    faults = [f"{key} is missing" for key in sorted(own.keys() - weights.keys())]
    faults += [f"{key} is not the network's" for key in sorted(weights.keys() - own.keys())]
    for key in sorted(own.keys() & weights.keys()):
        here, there = (tuple(getattr(one, "shape", ())) for one in (weights[key], own[key]))
        if here != there:
            faults.append(f"{key} has the shape {here} instead of {there}")
    return faults


def _verify(run: _Run) -> tuple[str, str]:
    if DENSE not in run.keys:
        return NOT_CHECKED, f"configs/inference.json has no {DENSE}"
    from monai.bundle import verify_net_in_out

    verify_net_in_out(
        net_id=DENSE, meta_file=run.metadata, config_file=run.file, device="cpu", any=ANY_SIZE, **run.overrides
    )
    return PASSED, f"{DENSE} gives what the metadata says"


def _export(run: _Run) -> tuple[str, str]:
    if DENSE not in run.keys:
        return NOT_CHECKED, f"configs/inference.json has no {DENSE}"
    from monai.bundle import ckpt_export

    network = run.build(DENSE)
    file = weights_file(run.content.folder)
    known = None if file is None else read_plain(file)
    fits = known is not None and not _misfits(known, network)
    with tempfile.TemporaryDirectory(prefix="seg3d_check_") as folder:
        weights, target = Path(folder) / "model.pt", Path(folder) / "model.ts"
        torch.save(known if fits else network.state_dict(), weights)
        files: dict[str, Any] = {
            "filepath": str(target),
            "ckpt_file": str(weights),
            "meta_file": run.metadata,
            "config_file": run.file,
        }
        try:
            ckpt_export(net_id=DENSE, **files, **run.overrides)
            how = "scripted"
        except Exception:  # most networks cannot be scripted; MONAI offers to trace them
            ckpt_export(net_id=DENSE, use_trace=True, input_shape=run.input_shape(), **files, **run.overrides)
            how = "traced"
        size = target.stat().st_size
    whose = "the bundle's" if fits else "its own, as none are shipped" if known is None else "its own, as keys differ"
    return PASSED, f"{DENSE} is {how} to {size:,} bytes; weights: {whose}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what MONAI logs and warns on the way."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
