"""Fixtures of the backbones' tests."""

from functools import partial

import pytest
import torch


@pytest.fixture
def cpu_linspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's Swin reads numbers of a linspace while it is built, which on the meta device have no values."""
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
