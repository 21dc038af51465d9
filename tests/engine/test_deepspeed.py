"""DeepSpeed trains as one process does, at every ZeRO stage, and its checkpoints go on anywhere."""

import json
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_toys import (
    MODELS,
    adam_trainer,
    empty_crop,
    evaluated,
    go_on,
    model_trainer,
    parameters_without_gradient,
    save,
    settings,
    skip,
    train,
    train_in_parts,
    train_model,
)
from ignite.engine import Events
from replica_toys import CropsOfRank, in_processes, toy_trainer

from seg3d_monai.engine.deepspeed import check_sections, fill_settings

STAGES = [0, 1, 2, 3]
OVERLAYS = sorted((Path(__file__).parents[2] / "bundles").glob("*/configs/overlays/deepspeed_*.json"))
IN_BUNDLES = {path.stem: json.loads(path.read_text())["train#trainer#deepspeed"] for path in OVERLAYS}
OFFLOAD = IN_BUNDLES["deepspeed_zero3_offload"]
HALF = {"bf16": {"enabled": "auto"}}
POISONED = [(2, 2), (6, 2)]  # the crop of the second process that is not a number, batches a step
stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def in_two_processes(folder):
    """(function, *arguments) -> what it returns in the first and in the second process; they start once for all."""
    single = adam_trainer(0, 1, None)
    single.add_event_handler(Events.EPOCH_COMPLETED(once=1), single.terminate)
    single.run()
    save(0, single, folder / "single.pt")
    calls = [
        *((train, stage, 0.3) for stage in STAGES),
        (train, 3, None, OFFLOAD),
        *((train_in_parts, stage, folder) for stage in STAGES),
        *((go_on, stage, folder / "single.pt") for stage in STAGES),
        *((skip, stage, *poisoned) for stage in (None, *STAGES) for poisoned in POISONED),
        *((train_model, name, stage) for name in MODELS for stage in (None, 3)),
        (train_model, "maskdino3d", 3, "bf16", HALF),
    ]
    found = in_processes(2, calls, folder)

    def result(*call):
        of_ranks = found[calls.index(call)]
        for value in of_ranks:
            if isinstance(value, Exception):
                raise value
        return of_ranks

    return result


def assert_near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@stages
def test_two_processes_train_as_one(stage, in_two_processes):
    averaged, trained = train(0, 1, None, 0.3)
    (first, its_trained), (second, _) = in_two_processes(train, stage, 0.3)
    assert_near(first, averaged)
    assert_near(second, averaged)
    assert_near(its_trained, trained)


def test_weights_may_lie_on_the_cpu(in_two_processes):
    assert_near(in_two_processes(train, 3, None, OFFLOAD)[0], train(0, 1, None))


@stages
def test_a_resumed_training_has_the_same_bits(stage, folder, in_two_processes):
    (whole, resumed), _ = in_two_processes(train_in_parts, stage, folder)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@stages
def test_it_goes_on_in_another_number_of_processes(stage, folder, in_two_processes):
    whole = adam_trainer(0, 1, None)
    whole.run()
    assert_near(in_two_processes(go_on, stage, folder / "single.pt")[0], evaluated(whole))
    assert_near(go_on(0, 1, None, folder / f"zero{stage}.pt"), evaluated(whole))


@pytest.mark.parametrize(("poison", "batches"), POISONED)
@stages
def test_a_batch_is_left_out_as_without_deepspeed(stage, poison, batches, in_two_processes):
    wanted, _ = in_two_processes(skip, None, poison, batches)
    first, second = in_two_processes(skip, stage, poison, batches)
    assert_near(first, wanted)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_instances_goes_along(name, in_two_processes):
    """Nothing waits for a module that another process skips, and the step is that of DistributedDataParallel."""
    (before, plain, _), _ = in_two_processes(train_model, name, None)
    (_, first, readers), (_, second, _) = in_two_processes(train_model, name, 3)
    assert readers == []
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert any(not torch.equal(before[key], plain[key]) for key in plain)
    for key, value in plain.items():
        assert (first[key] - value).norm() <= 1e-4 * (value - before[key]).norm() + 1e-6, key


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient_without_any_instance(name):
    loader = CropsOfRank(num_crops=1, batch_size=1, make=empty_crop)
    trainer = model_trainer(name, loader)
    trainer.run()
    assert parameters_without_gradient(trainer.network) == []


def test_weights_may_be_kept_in_bf16(in_two_processes):
    (before, first, _), (_, second, _) = in_two_processes(train_model, "maskdino3d", 3, "bf16", HALF)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in first.values())
    # Float32 weights are kept beside them, from the start: a step is far smaller than what bfloat16 rounds away.
    (_, plain, _), _ = in_two_processes(train_model, "maskdino3d", None)
    moved, off = (
        sum((value - wanted[key]).square().sum() for key, value in plain.items()) for wanted in (before, first)
    )
    assert 0 < off < 0.05 * moved


def filled(given, amp_type=None, batches=3, clip_norm=5.0, batch_size=2):
    return fill_settings(given, amp_type, batches, clip_norm, batch_size)


def test_settings_are_filled_from_the_bundle():
    found = filled(settings(3, train_batch_size="auto", bf16={"enabled": "auto"}), torch.bfloat16)
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_batch_size"] == 6
    assert found["gradient_clipping"] == 5.0
    assert found["bf16"]["enabled"] is True
    assert filled({"bf16": {"enabled": "auto"}})["bf16"]["enabled"] is False
    assert filled({}, clip_norm=None)["gradient_clipping"] == 0.0


def test_the_bundles_have_an_overlay_for_each_stage():
    assert len(OVERLAYS) == 4 * len(IN_BUNDLES)
    assert [IN_BUNDLES[f"deepspeed_zero{stage}"]["zero_optimization"]["stage"] for stage in STAGES] == STAGES
    assert all(filled(given)["train_batch_size"] == 6 for given in IN_BUNDLES.values())


@pytest.mark.parametrize(
    ("given", "amp_type", "message"),
    [
        ({"zero_optimisation": {}}, None, "nearest valid key is 'zero_optimization'"),
        ({"optimizer": {"type": "Adam"}}, None, "the bundle's `optimizer` is used"),
        ({"train_batch_size": 8}, None, r"is 8 and .* batch_size 2 x accumulation_steps 3 x 1 processes = 6"),
        ({"train_micro_batch_size_per_gpu": 4}, None, "is 4 and batch_size is 2"),
        ({"gradient_accumulation_steps": 2}, None, "is 2 and accumulation_steps is 3"),
        ({"gradient_clipping": 1.0}, None, r"is 1.0 and clip_norm is 5.0"),
        ({"zero_optimization": {"stage": 4}}, None, "choose 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, None, "choose 'cpu'"),
        ({"bf16": {"enabled": True}}, None, "amp is not bf16"),
        ({"bf16": {"enabled": True}}, torch.bfloat16, "choose stage 1 to 3"),
        ({}, torch.float16, "add deepspeed#fp16#enabled='auto'"),
    ],
)
def test_settings_that_contradict_are_refused(given, amp_type, message):
    with pytest.raises(ValueError, match=message):
        filled(given, amp_type)


def test_the_sections_of_the_bundles_are_known():
    for given in IN_BUNDLES.values():
        check_sections(given)
    check_sections({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stages": 3}}, "zero_optimization#stages is unknown; the nearest valid key is 'stage'"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "offload_param#devise .* 'device'"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, "cpu_checkpoint is unknown; .* 'cpu_checkpointing'"),
        ({"flops_profiler": {"profile_steps": 2}}, "flops_profiler#profile_steps is unknown; .* 'profile_step'"),
        ({"bf16": {"enable": True}}, "bf16#enable is unknown; the nearest valid key is 'enabled'"),
        ({"csv_monitor": {"folder_name": "x"}}, "csv_monitor#folder_name is unknown"),
    ],
)
def test_a_misspelt_key_of_a_section_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_sections(given)


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"seg3d_monai\[cluster\]"):
        toy_trainer(CropsOfRank(num_crops=4, batch_size=2), deepspeed=settings(3))
