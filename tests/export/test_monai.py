"""MONAI's own verify_net_in_out and ckpt_export on the bundles' key dense_net_def."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import changes
from monai.bundle import ConfigParser
from monai.bundle.scripts import ckpt_export, verify_net_in_out
from torch import nn

from seg3d_monai.engine import check_config
from seg3d_monai.engine.checkpoint import load_weights
from seg3d_monai.export import DenseTensor

ROOT = Path(__file__).parents[2]
BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
SCHEMAS = sorted((ROOT.parent / "shared" / "schemas").glob("meta_schema_*.json"))
bundles = pytest.mark.parametrize("bundle", BUNDLES)


def files(bundle: str) -> dict[str, str]:
    configs = ROOT / "bundles" / bundle / "configs"
    return {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}


@bundles
@pytest.mark.parametrize("n", [1, 2])
def test_metadata_tells_shapes_that_the_network_takes(bundle: str, n: int) -> None:
    verify_net_in_out(net_id="dense_net_def", device="cpu", n=n, **files(bundle))
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 5}
    with pytest.raises(ValueError, match="output channel number"):
        verify_net_in_out(net_id="dense_net_def", device="cpu", n=n, **files(bundle), **wrong)


@bundles
def test_the_output_has_the_shape_that_metadata_tells(bundle: str) -> None:
    parser = ConfigParser()
    parser.read_config(files(bundle)["config_file"])
    shape = json.loads(Path(files(bundle)["meta_file"]).read_text())["network_data_format"]["outputs"]["pred"]
    with torch.no_grad():
        found = parser.get_parsed_content("dense_net_def").eval()(torch.rand(1, 1, 16, 64, 32))
    assert found.shape[1] == shape["num_channels"]
    if bundle == "maskrcnn3d":
        assert found.shape[2:] == (3 * (8 * 16 * 8 + 4 * 8 * 4),)
    else:
        assert found.shape[2:] == (16, 32, 16)  # the strides of "16*n" of 16, 32 and 32 voxels
        assert (found.min() >= 0) & (found.max() <= 1)


@bundles
def test_metadata_stays_valid(bundle: str) -> None:
    (schema,) = SCHEMAS
    jsonschema.validate(json.loads(Path(files(bundle)["meta_file"]).read_text()), json.loads(schema.read_text()))


@bundles
def test_no_key_of_the_configuration_is_unused(bundle: str) -> None:
    for names in (["inference"], ["inference", "annotate"]):
        parser = ConfigParser()
        parser.read_config([str(ROOT / "bundles" / bundle / "configs" / f"{name}.json") for name in names])
        parser.parse()
        check_config(["seam_check", "suggest"], parser=parser)


@bundles
def test_monai_exports_weights_of_a_training(
    bundle: str, trained: Callable[..., tuple[Path, Path]], small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Without `key_in_ckpt`: model.pt is a plain state dict."""
    weights, _ = trained(bundle, seed=4)
    shape = [2, 1, 16, 32, 48]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ckpt_export(
            net_id="dense_net_def",
            filepath=str(tmp_path / "net.ts"),
            ckpt_file=str(weights),
            use_trace=True,
            input_shape=shape,
            device="cpu",
            **files(bundle),
            **changes(bundle),
        )
    exported = torch.jit.load(tmp_path / "net.ts")
    state = torch.load(weights, weights_only=True)
    found_state = exported.state_dict()
    assert found_state.keys() - state.keys() <= {"anchors.steps"}  # TorchScript has no buffers that are not stored
    for name, values in state.items():
        assert torch.equal(found_state[name], values)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = exported(images)
        torch.testing.assert_close(
            found, DenseTensor(load_weights(small(bundle), weights))(images), rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(found, DenseTensor(small(bundle))(images), rtol=1e-2)
