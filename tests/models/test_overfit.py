"""Each model as its bundle ships it learns four crops of 2 to 60 touching cells by heart: all 104, and nothing else."""

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from overfit_toys import image_of, predicted_labels, target_of, tissue

from seg3d_monai.inference.precision import autocast_dtype
from seg3d_monai.metrics import InstanceMetrics

BUNDLES = Path(__file__).parents[2] / "bundles"
COUNTS = (2, 12, 30, 60)
STEPS = {"mask2former3d": 600, "maskdino3d": 400, "maskrcnn3d": 400}
CHECK_EVERY = 50


def shipped(bundle):
    """Network and loss of a bundle's training."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / bundle / "configs" / "train.json"))
    return parser.get_parsed_content("network_def"), parser.get_parsed_content("loss")


def found_in(network, images, labels):
    """Counts and scores at an IoU of 0.5, pooled over the crops."""
    metrics = InstanceMetrics()
    for image, label in zip(images, labels, strict=True):
        metrics.update(label.numpy(), predicted_labels(network, image))
    return metrics.compute()["thresholds"]["0.5"]


def learn(network, loss, labels, steps):
    """Train on all crops at once until all cells are found; the last check."""
    images, targets = torch.stack([image_of(label) for label in labels]), [target_of(label) for label in labels]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    amp = autocast_dtype("auto", "cpu")
    for step in range(1, steps + 1):
        with torch.autocast("cpu", amp, enabled=amp is not None):
            outputs = network(images, targets)
        total = sum(loss(outputs, targets).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == steps:
            found = found_in(network, images, labels)
            print(
                f"step {step}: loss {total.item():.2f}, {found['tp']} found, {found['fp']} false, F1 {found['f1']:.3f}"
            )
            if found["f1"] == 1:
                break
    return found


def test_crops_hold_cells_that_touch():
    for count in COUNTS:
        label = tissue(count)
        assert label.unique().tolist() == list(range(count + 1))
        assert target_of(label)["boxes"].shape == (count, 6)
        for number in range(1, count + 1):
            grown = torch.nn.functional.max_pool3d((label == number).float()[None, None], 3, 1, 1)[0, 0] > 0
            assert len(label[grown].unique()) > 2, "a cell without a neighbour"


@pytest.mark.long
@pytest.mark.parametrize("bundle", STEPS)
def test_four_crops_are_learnt_by_heart(bundle):
    torch.manual_seed(0)
    network, loss = shipped(bundle)
    found = learn(network, loss, [tissue(count) for count in COUNTS], STEPS[bundle])
    assert (found["tp"], found["fp"], found["fn"]) == (sum(COUNTS), 0, 0)
    assert found["f1"] == 1
