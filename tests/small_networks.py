"""Overrides that make the bundles' networks small enough to try them."""

SMALL_TRANSFORMER = {
    "num_queries": 12,
    "network_def#hidden": 16,
    "network_def#mask_channels": 8,
    "network_def#encoder_feedforward": 16,
    "network_def#decoder_feedforward": 16,
}
SMALL_NETWORK = {
    "maskrcnn3d": {"network_def#fpn_channels": 8, "network_def#box_hidden": 16, "network_def#mask_channels": 8},
    "maskdino3d": SMALL_TRANSFORMER,
    "mask2former3d": SMALL_TRANSFORMER,
}
