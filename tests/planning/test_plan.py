"""Plans of every bundle: overlays that the bundles accept, options that win, and refusals."""

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser
from planning_toys import rows_of_boxes, volume_facts, write_index

from seg3d_monai.cli import main
from seg3d_monai.planning import BundleConfig, plan_bundle, take_fingerprint, write_plans
from seg3d_monai.planning.choices import GIVEN

ROOT = Path(__file__).parents[2]
BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
GB = 10**9
SHAPE, EXTENT = (20, 48, 56), (3, 9, 8)  # six rows of 12: extents of few planes


def config(name="maskrcnn3d", overlays=()):
    return BundleConfig(ROOT / "bundles" / name, overlays)


def decision(plan, key):
    (found,) = (decision for decision in plan.decisions if decision.key == key)
    return found


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    boxes = rows_of_boxes(SHAPE, EXTENT)
    volumes = {"a": (SHAPE, boxes), "b": (SHAPE, boxes), "later": ((40, 80, 80), {1: (1, 1, 1, 39, 79, 79)})}
    return write_index(tmp_path_factory.mktemp("data"), volumes, {"split": ["train", "train", "val"]})


@pytest.fixture(scope="module")
def fingerprint(index):
    return take_fingerprint(index)


@pytest.fixture(scope="module")
def plans(fingerprint):
    return {name: plan_bundle(fingerprint, config(name), 8 * GB, {}) for name in BUNDLES}


def test_a_plan_of_thin_objects(plans):
    plan = plans["maskrcnn3d"]
    assert decision(plan, "backbone#stem_stride").value == [1, 1, 1]  # 9 pixels leave no 8 cells when halved
    assert decision(plan, "crop_size").value[0] <= SHAPE[0]
    anchors = decision(plan, "network_def#anchor_shapes").value
    assert list(map(float, EXTENT)) in [shape for level in anchors for shape in level]
    assert "IoU of 1.00" in decision(plan, "network_def#anchor_shapes").reason
    halo = decision(plan, "halo").value
    assert all(n >= extent for n, extent in zip(halo, EXTENT, strict=True))
    assert decision(plan, "target_spacing_um").value is None
    assert "target_spacing_um" not in plan.train


@pytest.mark.parametrize("name", BUNDLES)
def test_overlays_build_one_network_for_training_and_prediction(name, plans, tmp_path):
    plan = plans[name]
    networks = []
    for which, overlay in (("train", plan.train), ("inference", plan.inference)):
        file = tmp_path / f"{which}.json"
        file.write_text(json.dumps(overlay))
        parser = ConfigParser()
        parser.read_config([str(ROOT / "bundles" / name / "configs" / f"{which}.json"), str(file)])
        networks.append(parser.get_parsed_content("network_def"))
        assert parser.get_parsed_content("block_size") == decision(plan, "block_size").value
    trained, other = networks
    other.load_state_dict(trained.state_dict())
    assert repr(other) == repr(trained)
    assert {"crop_size", "batch_size"} & plan.inference.keys() == set()


@pytest.mark.parametrize("name", BUNDLES)
def test_overlays_hold_what_differs_and_nothing_else(name, plans):
    bundle = config(name)
    for key, value in (plans[name].train | plans[name].inference).items():
        assert value != bundle.get(key)
    changed = {decision.key for decision in plans[name].decisions if decision.is_change}
    assert plans[name].train.keys() | plans[name].inference.keys() == changed


def test_transformers_get_queries_and_no_anchors(plans):
    assert "network_def#anchor_shapes" not in {d.key for d in plans["maskdino3d"].decisions}
    assert decision(plans["mask2former3d"], "num_queries").value % 50 == 0


def test_what_is_given_wins_and_the_rest_follows(fingerprint, plans):
    given = {"crop_size": [8, 32, 32], "network_def#anchor_levels": ["p1"], "network_def#box_hidden": 32}
    plan = plan_bundle(fingerprint, config(), 8 * GB, given)
    assert decision(plan, "crop_size").value == [8, 32, 32]
    assert decision(plan, "crop_size").reason == GIVEN
    assert len(decision(plan, "network_def#anchor_shapes").value) == 1  # one level, as many anchors
    assert plan.train["network_def#box_hidden"] == plan.inference["network_def#box_hidden"] == 32
    assert "num_queries" not in plan.train
    shapes = [[[3, 9, 8], [4, 10, 10]]] * 3
    given = {"crop_size": [8, 32, 32], "network_def#anchor_shapes": shapes}
    assert len(decision(plan_bundle(fingerprint, config(), 8 * GB, given), "network_def#anchor_levels").value) == 3
    # A smaller crop holds fewer objects, so a step needs more of them.
    assert plan.facts[0] != plans["maskrcnn3d"].facts[0]


def test_memory_makes_crops_smaller_and_says_what_one_object_needs(fingerprint):
    given = {"train#trainer#max_epochs": 1}
    with pytest.raises(ValueError, match=r"memory=1 MB is too small: .* takes [\d.]+ MB; give that much") as refused:
        plan_bundle(fingerprint, config(), 10**6, given)
    words = str(refused.value).split()
    needed = float(words[words.index("takes") + 1])
    plan = plan_bundle(fingerprint, config(), round((needed + 1) * 10**6), given)
    assert decision(plan, "batch_size").value == 1
    assert "memory holds no more" in decision(plan, "crop_size").reason
    with pytest.raises(ValueError, match="as given"):
        plan_bundle(fingerprint, config(), round((needed + 1) * 10**6), {"crop_size": [16, 48, 48]})


def test_volumes_of_two_voxel_sizes_meet_at_the_median(tmp_path):
    coarse = rows_of_boxes(SHAPE, EXTENT)
    fine = {n: (z1, 2 * y1, 2 * x1, z2, 2 * y2, 2 * x2) for n, (z1, y1, x1, z2, y2, x2) in coarse.items()}
    volumes = {"a": (SHAPE, coarse), "b": (SHAPE, coarse), "c": ((20, 96, 112), fine)}
    index = write_index(tmp_path, volumes, spacings=[(2, 1, 1), (2, 1, 1), (2, 0.5, 0.5)])
    fingerprint = take_fingerprint(index)
    plan = plan_bundle(fingerprint, config(), 8 * GB, {})
    assert plan.train["target_spacing_um"] == [2, 1, 1]
    assert "target_spacing_um" not in plan.inference  # the checkpoint says it
    anchors = decision(plan, "network_def#anchor_shapes").value
    assert list(map(float, EXTENT)) in [shape for level in anchors for shape in level]
    finer = plan_bundle(fingerprint, config(), 8 * GB, {"target_spacing_um": [2, 0.5, 0.5]})
    shapes = [shape for level in decision(finer, "network_def#anchor_shapes").value for shape in level]
    assert [3, 18, 16] in shapes


def test_without_voxel_sizes_all_is_in_voxels(tmp_path):
    index = write_index(tmp_path, {"a": (SHAPE, rows_of_boxes(SHAPE, EXTENT))}, spacings=[None])
    fingerprint = take_fingerprint(index)
    plan = plan_bundle(fingerprint, config(), 8 * GB, {})
    assert "planned in voxels" in decision(plan, "target_spacing_um").reason
    with pytest.raises(ValueError, match="a do not say their voxel size; give it in the manifest's columns"):
        plan_bundle(fingerprint, config(), 8 * GB, {"target_spacing_um": [2, 1, 1]})


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((1, 40, 48), {1: (0, 3, 4, 1, 12, 14), 2: (0, 20, 20, 1, 31, 30)}),  # one plane
        ((12, 40, 48), {1: (0, 0, 0, 12, 40, 48)}),  # one object that fills its volume
        ((12, 40, 48), {1: (4, 20, 20, 5, 21, 21)}),  # one voxel
    ],
)
def test_odd_volumes_can_be_planned(tmp_path, shape, boxes):
    index = write_index(tmp_path, {"a": (shape, boxes)})
    plan = plan_bundle(take_fingerprint(index), config(), 8 * GB, {})
    assert all(n <= max(whole, 1) for n, whole in zip(decision(plan, "crop_size").value, shape, strict=True))


def test_channels_must_agree(fingerprint):
    from dataclasses import replace

    mixed = replace(fingerprint, volumes=(fingerprint.volumes[0], volume_facts("c", SHAPE, channels=2, num_objects=1)))
    with pytest.raises(ValueError, match="1 and 2 channels"):
        plan_bundle(mixed, config(), 8 * GB, {})


def test_blocks_stay_large_where_norms_do_not_mind(fingerprint, tmp_path):
    plan = plan_bundle(fingerprint, config(), 8 * GB, {})
    own = config().get("block_size")
    assert all(n >= m for n, m in zip(decision(plan, "block_size").value, own, strict=True))
    assert "do not depend" in decision(plan, "block_size").reason
    assert "batch" not in str(plan.train), "what the bundle says is not said again"
    overlay = tmp_path / "group.json"
    overlay.write_text(json.dumps({"backbone#norm": "group", "network_def#norm": "group"}))
    grouped = plan_bundle(fingerprint, config(overlays=[str(overlay)]), 8 * GB, {})
    crop = decision(grouped, "crop_size").value
    assert all(n <= m for n, m in zip(decision(grouped, "block_size").value, crop, strict=True))


def test_a_plan_on_top_of_an_overlay(fingerprint, tmp_path):
    overlay = tmp_path / "two.json"
    overlay.write_text(json.dumps({"network_def#fpn_channels": 16, "backbone#width": 8, "max_minutes": 1}))
    bundle = config(overlays=[str(overlay)])
    assert bundle.get("network_def#fpn_channels") == 16
    plan = plan_bundle(fingerprint, bundle, 8 * GB, {})
    assert "network_def#fpn_channels" not in plan.train


def test_the_files_and_the_words(index, tmp_path):
    said: list[str] = []
    places = [(ROOT / "bundles" / "maskrcnn3d", [])]
    folder = tmp_path / "plan"
    (plan,) = write_plans(index.path, folder, places, given={"max_minutes": 3.0}, report=said.append)
    names = {"fingerprint.json", "plan.txt", "maskrcnn3d_train.json", "maskrcnn3d_inference.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "maskrcnn3d_train.json").read_text()) == plan.train
    assert plan.train["max_minutes"] == 3
    assert "max_minutes" not in json.loads((folder / "maskrcnn3d_inference.json").read_text())
    text = (folder / "plan.txt").read_text()
    assert all(decision.key in text for decision in plan.decisions)
    assert max(map(len, text.splitlines())) <= 120
    assert json.loads((folder / "fingerprint.json").read_text())["num_volumes"] == 2
    assert said[-1] == f"seg3d train maskrcnn3d --overlay {folder}/maskrcnn3d_train"
    # The same once more is no harm; an edited plan is not written over.
    write_plans(index.path, folder, places, given={"max_minutes": 3.0}, report=said.append)
    (folder / "maskrcnn3d_train.json").write_text("{}\n")
    with pytest.raises(FileExistsError, match=r"maskrcnn3d_train\.json would change"):
        write_plans(index.path, folder, places, given={"max_minutes": 3.0}, report=said.append)
    write_plans(index.path, folder, places, given={"max_minutes": 3.0}, restart=True, report=said.append)
    assert json.loads((folder / "maskrcnn3d_train.json").read_text()) == plan.train


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crop_size": [8, 16]}, r"crop_size=\[8, 16\] is not three voxel counts from 1; give \[z,y,x\]"),
        ({"halo": [-1, 0, 0]}, "three voxel counts from 0"),
        ({"batch_size": 0}, "batch_size=0 is not a count"),
        ({"crop_sise": [8, 16, 16]}, r"crop_sise is no key of maskrcnn3d; did you mean crop_size\?"),
        ({"network_def#box_hiden": 3}, r"did you mean network_def#box_hidden\?"),
        ({"num_queries": 100}, "num_queries is no key of maskrcnn3d"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_plans(tmp_path / "none.sqlite", tmp_path, [(ROOT / "bundles" / "maskrcnn3d", [])], given=given)


def test_no_index_no_bundle_and_no_amount(tmp_path):
    places = [(ROOT / "bundles" / "maskrcnn3d", [])]
    with pytest.raises(FileNotFoundError, match="no crop index"):
        write_plans(tmp_path / "none.sqlite", tmp_path, places)
    with pytest.raises(FileNotFoundError, match=r"has no train\.json"):
        write_plans(tmp_path / "none.sqlite", tmp_path, [(tmp_path, [])])
    with pytest.raises(ValueError, match="memory='much' is no amount of memory"):
        write_plans(tmp_path / "none.sqlite", tmp_path, places, memory="much")


def test_the_command_plans_and_names_mistakes(index, tmp_path, capsys):
    folder = tmp_path / "plan"
    words = ["plan", str(index.path), "--output", str(folder), "--bundle", "maskdino3d", "--crop_size", "[8,32,32]"]
    assert main([*words, "--num_queries", "150", "--memory", "4GB"]) == 0
    shown = capsys.readouterr().out
    assert "maskdino3d: " in shown
    overlay = json.loads((folder / "maskdino3d_train.json").read_text())
    assert (overlay["crop_size"], overlay["num_queries"]) == ([8, 32, 32], 150)
    assert main([*words, "--num_queries", "150", "--memory", "4GB"]) == 0  # the same plan is there
    for flags, message in [
        (["--bundle", "maskrcn3d"], "bundle 'maskrcn3d' does not exist"),
        (["--crop_sise", "[8,32,32]"], "did you mean crop_size?"),
        (["--memory", "1MB"], "give that much"),
        (["--batch_size", "two"], "--batch_size = 'two' is not an integer"),
    ]:
        assert main(["plan", str(index.path), "--output", str(tmp_path / "no"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
