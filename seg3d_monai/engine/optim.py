"""Parameter groups of an optimizer: learning rates that fall with depth, and parameters without weight decay.

Layer-wise decay as in BEiT (Bao et al. 2022) and ViTDet (Li et al. 2022): a backbone's first layers, which hold the
most general features, move least. The depth of a parameter is told by the backbone, wherever it sits in a network: any
module with a method `layers_by_depth()` that lists modules from the image up. This file must not know a model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(
    network: nn.Module, *, learning_rate: float, layer_decay: float = 1.0, decay_weights_only: bool = False
) -> list[dict[str, Any]]:
    """Groups for the `params` of any torch optimizer.

    Of L layers of a backbone, layer i, counted from 0 at the image, learns at `learning_rate * layer_decay ** (L - i)`;
    all that is in no layer, such as necks and heads, at `learning_rate`.

    Args:
        network: its parameters that require a gradient are grouped.
        learning_rate: of all that is no part of a backbone's layers, > 0.
        layer_decay: factor from each layer to the one before it, in (0, 1]; 1 gives all parameters the same rate.
        decay_weights_only: whether the optimizer's weight decay is kept to the weights of linear maps and convolutions.
            Norms, biases, embeddings, tables of positions, learned queries and scales then have none.

    Returns:
        Dictionaries {"params", "lr"}, with "weight_decay" 0 where there is none; the full rate comes first. Without
        layer_decay and decay_weights_only it is one group of all parameters, in their order.

    Raises:
        ValueError: learning_rate or layer_decay is out of its range, or the latter below 1 for a network without such
            a backbone.
    """
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float) or learning_rate <= 0:
        raise ValueError(f"learning_rate={learning_rate!r} cannot be used; give a number > 0, such as 0.001")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} is not in (0, 1]; give the factor from a layer to the one before")
    below_top = _layers_below_top(network)
    if layer_decay < 1 and not below_top:
        raise ValueError(
            f"layer_decay={layer_decay}: no part of {type(network).__name__} has a method layers_by_depth(), which "
            "tells the depth of its parameters; use a backbone that has one, or layer_decay=1"
        )
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = below_top.get(id(parameter), 0) if layer_decay < 1 else 0
        is_weight = name.endswith("weight") and parameter.ndim > 1 and id(parameter) not in embeddings
        is_spared = decay_weights_only and not is_weight
        group = groups.setdefault((depth, is_spared), {"params": [], "lr": learning_rate * layer_decay**depth})
        if is_spared:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def _layers_below_top(network: nn.Module) -> dict[int, int]:
    """Of each parameter (by id) in a backbone's layers, how many layers up it is to what is in none: >= 1."""
    found: dict[int, int] = {}
    for backbone in network.modules():
        layers_by_depth = getattr(backbone, "layers_by_depth", None)
        if layers_by_depth is None:
            continue
        layers: list[list[nn.Module]] = layers_by_depth()
        for i, modules in enumerate(layers):
            found |= {id(parameter): len(layers) - i for module in modules for parameter in module.parameters()}
    return found
