"""autocast_dtype: what "auto" means on each device, and what is refused."""

import pytest
import torch

from seg3d_monai.inference.precision import autocast_dtype


@pytest.mark.parametrize(
    ("amp", "device", "dtype"),
    [
        ("off", "cpu", None),
        ("off", "cuda", None),
        ("bf16", "cpu", torch.bfloat16),
        ("bf16", "cuda:1", torch.bfloat16),
        ("fp16", "cuda", torch.float16),
    ],
)
def test_a_named_type_is_taken_as_it_is(amp: str, device: str, dtype: torch.dtype | None) -> None:
    assert autocast_dtype(amp, device) is dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_auto_is_bf16_only_where_the_processor_computes_in_it(
    native: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert autocast_dtype("auto", torch.device("cpu")) is dtype


@pytest.mark.parametrize(("amp", "device"), [("fp16", "cpu"), ("half", "cuda"), ("", "cpu")])
def test_others_are_refused_with_the_choices(amp: str, device: str) -> None:
    with pytest.raises(ValueError, match="choose one of auto, off, bf16, fp16"):
        autocast_dtype(amp, device)
