"""Plans a training from its data: fingerprint, rules, and an overlay for each bundle."""

from seg3d_monai.planning.bundle_config import BundleConfig
from seg3d_monai.planning.choices import Decision
from seg3d_monai.planning.fingerprint import Fingerprint, VolumeFacts, take_fingerprint
from seg3d_monai.planning.plan import Plan, plan_bundle
from seg3d_monai.planning.write import write_plans

__all__ = [
    "BundleConfig",
    "Decision",
    "Fingerprint",
    "Plan",
    "VolumeFacts",
    "plan_bundle",
    "take_fingerprint",
    "write_plans",
]
