"""Tests that take `kernels` run on the compiled CPU kernels and on the reference, through the same dispatcher."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from seg3d_monai.ops import registration


@pytest.fixture(params=["compiled", "reference"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == registration.LOADED.path:
        yield request.param
        return
    if request.param == "compiled":
        pytest.skip(f"no compiled operators in this process: {registration.LOADED.reason}")
    library = torch.library.Library(registration.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name, kernel in registration.REFERENCE_KERNELS.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    yield request.param
    library._destroy()
