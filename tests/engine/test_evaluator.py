"""Evaluation of whole volumes with toy predictors whose scores are counted by hand, and the final report."""

import json

import numpy as np
import pytest
import torch
from engine_toys import ToyNetwork, ToyPredictor, three_bars, toy_item
from monai.engines import Evaluator

from seg3d_monai.engine import FinalReport, VolumeEvaluator
from seg3d_monai.engine.checkpoint import write_weights


@pytest.mark.parametrize("blocks", [{}, {"block_size": (4, 8, 8), "halo": (2, 4, 4)}])
def test_exact_predictions(blocks):
    evaluator = VolumeEvaluator(dataset=[toy_item(three_bars())], predictor=ToyPredictor(), **blocks)
    evaluator.run()
    assert {evaluator.state.metrics[name] for name in ("f1_10", "f1_50", "f1_95", "map", "seg", "mucov", "aji")} == {
        1.0
    }
    assert evaluator.key_metric == 1.0
    assert isinstance(evaluator, Evaluator)


def test_counts_are_pooled_over_volumes():
    """Two of three, then none of one (a bar too high for the predictor): tp 2, fp 0, fn 2."""
    lone = np.zeros((5, 4, 9), dtype=np.uint16)
    lone[1:3, 1:3, 2:7] = 9
    evaluator = VolumeEvaluator(
        dataset=[toy_item(three_bars()), toy_item(lone)], predictor=ToyPredictor(largest=2), key_metric="recall_50"
    )
    evaluator.run()
    evaluator.run(global_epoch=7)  # a second run starts from zero
    at_half = evaluator.state.report["thresholds"]["0.5"]
    assert (at_half["tp"], at_half["fp"], at_half["fn"]) == (2, 0, 2)
    assert evaluator.state.metrics["f1_50"] == pytest.approx(2 / 3)
    assert evaluator.state.metrics["precision_50"] == 1.0
    assert evaluator.key_metric == 0.5
    assert evaluator.state.output == [{"name": "toy", "instances": 0}]
    assert evaluator.state.epoch == 7
    assert evaluator.progress == 1.0


def test_nothing_true_and_nothing_found():
    evaluator = VolumeEvaluator(dataset=[toy_item(np.zeros((3, 4, 5), dtype=np.uint16))], predictor=ToyPredictor())
    evaluator.run()
    assert evaluator.state.metrics["f1_50"] == 0.0


def test_key_metric_that_does_not_exist_is_refused():
    evaluator = VolumeEvaluator(dataset=[toy_item(three_bars())], predictor=ToyPredictor(), key_metric="f1")
    evaluator.run()
    with pytest.raises(ValueError, match=r"key_metric='f1' is not computed; choose one of .*f1_50"):
        _ = evaluator.key_metric


@pytest.mark.parametrize("given", [None, "other.pt"])
def test_final_line(tmp_path, capsys, given):
    trained, network = ToyNetwork(), ToyNetwork()
    write_weights(tmp_path / (given or "model.pt"), trained.state_dict())
    evaluator = VolumeEvaluator(dataset=[toy_item(three_bars())], predictor=ToyPredictor(largest=2))
    checkpoint = given and tmp_path / given
    FinalReport(evaluator=evaluator, network=network, output_dir=tmp_path, checkpoint=checkpoint).final()
    assert capsys.readouterr().out.splitlines()[-1] == "F1@0.5 = 0.800"
    assert torch.equal(network.linear.weight, trained.linear.weight)
    assert json.loads((tmp_path / "metrics.json").read_text())["thresholds"]["0.5"]["tp"] == 2


def test_final_report_without_volumes_says_so(tmp_path, capsys, caplog):
    evaluator = VolumeEvaluator(dataset=[], predictor=ToyPredictor())
    FinalReport(evaluator=evaluator, network=ToyNetwork(), output_dir=tmp_path).final()
    assert capsys.readouterr().out == ""
    assert "no volume is kept for the final report" in caplog.text
