"""Instance metrics: a sparse contingency table, optimal matching, pooled scores."""

from seg3d_monai.metrics.contingency import ContingencyTable
from seg3d_monai.metrics.instance_metrics import InstanceMetrics
from seg3d_monai.metrics.matching import match_instances

__all__ = ["ContingencyTable", "InstanceMetrics", "match_instances"]
