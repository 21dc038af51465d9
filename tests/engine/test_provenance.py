"""What a prediction says of its making."""

import hashlib
import json

from monai.bundle import ConfigParser

from seg3d_monai import __version__
from seg3d_monai.engine import provenance  # noqa: F401  (named by the configuration below)


def described(tmp_path, **changes):
    root = tmp_path / "toy3d"
    (root / "configs").mkdir(parents=True, exist_ok=True)
    (root / "configs/metadata.json").write_text(json.dumps({"version": "0.3.1"}))
    config = {
        "imports": ["$import seg3d_monai.engine as engine"],
        "bundle_root": str(root),
        "checkpoint": str(root / "model.pt"),
        "input": "somewhere.tif",
        "num_workers": 1,
        "block_size": [4, 8, 8],
        "made_by": "$engine.provenance(@bundle_root, @checkpoint)",
    }
    parser = ConfigParser(config | changes)
    return parser.get_parsed_content("made_by")


def test_bundle_checkpoint_and_configuration_are_named(tmp_path):
    first = described(tmp_path)
    assert first["checkpoint_sha256"] is None
    (tmp_path / "toy3d/model.pt").write_bytes(b"weights")
    found = described(tmp_path)
    assert found["checkpoint_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert (found["bundle"], found["bundle_version"]) == ("toy3d", "0.3.1")
    assert (found["package"], found["package_version"]) == ("seg3d_monai", __version__)
    assert found["config"]["block_size"] == [4, 8, 8]
    assert json.loads(json.dumps(found)) == found


def test_where_and_how_it_ran_leave_no_trace(tmp_path):
    assert described(tmp_path) == described(tmp_path, input="elsewhere.tif", num_workers=8)
    assert described(tmp_path) != described(tmp_path, block_size=[8, 8, 8])
    assert str(tmp_path) not in json.dumps(described(tmp_path))
