"""Fixture of this folder's tests, over the toys of engine_toys.py."""

import pytest
import torch
from engine_toys import ToyLoader, ToyNetwork, toy_criterion

from seg3d_monai.engine import InstanceTrainer


@pytest.fixture
def make_trainer():
    """Build a trainer of the toy network; every call starts from the same weights."""

    def make(*, dropout=0.5, lr=0.01, optimizer=torch.optim.SGD, loader=None, **arguments):
        torch.manual_seed(5)
        network = ToyNetwork(dropout)
        return InstanceTrainer(
            **{
                "device": "cpu",
                "max_epochs": 3,
                "train_data_loader": loader or ToyLoader(),
                "network": network,
                "optimizer": optimizer(network.parameters(), lr=lr),
                "loss_function": toy_criterion,
                **arguments,
            }
        )

    return make
