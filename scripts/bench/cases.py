"""What is measured, and the bars it should meet: the sizes are data, and no bar makes the benchmark fail.

Ratios are baseline / ours, within one run. Every case has `quick` sizes for a smoke test.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import group_norm, layer_norm, ms_deform, nms, roi_align
from bench.problem import Problem


@dataclass(frozen=True)
class Bar:
    """A bound on one quantity of a row: `quantity` names a field of the row, and `limit` is met or not."""

    quantity: str
    limit: float
    is_least: bool = False

    def is_met(self, value: float) -> bool:
        """Whether the value is on the right side."""
        return value >= self.limit if self.is_least else value <= self.limit

    def judge(self, value: float | None) -> dict[str, Any]:
        """For the JSON file; None where the value could not be measured."""
        return {"bar": self.words, "value": value, "met": None if value is None else self.is_met(value)}

    @property
    def words(self) -> str:
        """For the table."""
        return BAR_WORDS[self.quantity].format(limit=self.limit)


BAR_WORDS = {
    "ratio": ">= {limit:g}x the baseline",
    "times_floor": "<= {limit:g}x the floor",
    "extra_of_results": "extra memory <= {limit:.0%} of the results",
    "ours_ms": "<= {limit:g} ms",
}


@dataclass(frozen=True)
class Case:
    """One row of the table: `make(device, dtype, **sizes)` gives the problem."""

    op: str
    name: str
    work: str
    make: Callable[..., Problem]
    sizes: dict[str, Any]
    quick: dict[str, Any]
    forward_bars: tuple[Bar, ...] = ()
    backward_bars: tuple[Bar, ...] = ()
    anisotropic: dict[str, Any] = field(default_factory=dict)
    quick_anisotropic: dict[str, Any] = field(default_factory=dict)
    has_bfloat16: bool = False
    """A row in the table of bfloat16 also without an anisotropic variant."""

    @property
    def full_name(self) -> str:
        """Operator and row."""
        return f"{self.op}/{self.name}"

    def problem(self, device: str, dtype: Any, is_quick: bool, **changed: Any) -> Problem:
        """The problem at the full or at the quick sizes."""
        return self.make(device, dtype, **{**(self.quick if is_quick else self.sizes), **changed})


def at_least(ratio: float) -> Bar:
    """So many times as fast as the baseline."""
    return Bar("ratio", ratio, is_least=True)


LEVELS = [(32, 32, 32), (16, 16, 16), (8, 8, 8), (4, 4, 4)]
ANISOTROPIC_LEVELS = [(16, 64, 48), (8, 32, 24), (4, 16, 12), (2, 8, 6)]
QUICK_LEVELS = [(4, 4, 4), (2, 2, 2)]
QUICK_ANISOTROPIC_LEVELS = [(2, 8, 6), (1, 4, 3)]
STRETCH = {"stretch": (16 / 36.6, 64 / 36.6, 48 / 36.6)}  # 16 x 64 x 48 voxels have the volume of 36.6 cubed

BOX = {"features": (2, 256, 32, 32, 32), "num_boxes": 1024, "sides": (4, 20), "out": 7, "ratio": 2}
MASK = {**BOX, "num_boxes": 256, "out": 14}
ADAPTIVE = {"features": (16, 1, 128, 128, 128), "num_boxes": 128, "sides": (20, 60), "out": 28, "ratio": 0}
QUICK_BOX = {"features": (2, 8, 8, 8, 8), "num_boxes": 16, "sides": (2, 6), "out": 3, "ratio": 2}
QUICK_MASK = {**QUICK_BOX, "num_boxes": 4, "out": 6}
QUICK_ADAPTIVE = {"features": (4, 1, 16, 16, 16), "num_boxes": 8, "sides": (5, 12), "out": 4, "ratio": 0}

CASES = [
    Case(
        op="roi_align3d",
        name="box",
        work="[2,256,32,32,32], 1,024 RoIs of 4 to 20 voxels, out 7, ratio 2",
        make=roi_align.make,
        sizes=BOX,
        quick=QUICK_BOX,
        forward_bars=(at_least(50), Bar("times_floor", 5), Bar("extra_of_results", 0.10)),
        backward_bars=(at_least(50),),
        anisotropic={"features": (2, 256, 16, 64, 48)},
        quick_anisotropic={"features": (2, 8, 4, 16, 12)},
    ),
    Case(
        op="roi_align3d",
        name="box_split",
        work="the same against the fastest grid_sample we found on 2 threads",
        make=roi_align.make,
        sizes={**BOX, "is_split": True},
        quick={**QUICK_BOX, "is_split": True},
    ),
    Case(
        op="roi_align3d",
        name="mask",
        work="the same features, 256 RoIs, out 14, ratio 2",
        make=roi_align.make,
        sizes=MASK,
        quick=QUICK_MASK,
        forward_bars=(at_least(80),),
        backward_bars=(at_least(80),),
        anisotropic={"features": (2, 256, 16, 64, 48)},
        quick_anisotropic={"features": (2, 8, 4, 16, 12)},
    ),
    Case(
        op="roi_align3d",
        name="adaptive",
        work="[16,1,128,128,128], 128 RoIs of 20 to 60 voxels, out 28, ratio 0",
        make=roi_align.make,
        sizes=ADAPTIVE,
        quick=QUICK_ADAPTIVE,
        forward_bars=(at_least(20),),
        backward_bars=(at_least(20),),
        anisotropic={"features": (16, 1, 64, 256, 128)},
        quick_anisotropic={"features": (4, 1, 12, 32, 16)},
    ),
    Case(
        op="nms3d",
        name="scattered_20k",
        work="20,000 boxes at constant density, sides 5 to 25, IoU 0.5",
        make=nms.make,
        sizes={"num_boxes": 20_000},
        quick={"num_boxes": 200},
        forward_bars=(at_least(1000),),
        anisotropic=STRETCH,
        quick_anisotropic=STRETCH,
    ),
    Case(
        op="nms3d",
        name="scattered_1m",
        work="1,000,000 boxes at the same density",
        make=nms.make,
        sizes={"num_boxes": 1_000_000, "has_baseline": False},
        quick={"num_boxes": 2_000, "has_baseline": False},
        forward_bars=(Bar("ours_ms", 3000),),
    ),
    Case(
        op="nms3d",
        name="clusters",
        work="20,000 boxes of side 16 in 50 clusters, centres jittered by N(0, 1)",
        make=nms.make,
        sizes={"num_boxes": 20_000, "num_clusters": 50},
        quick={"num_boxes": 200, "num_clusters": 5},
        forward_bars=(Bar("ours_ms", 500),),
    ),
    Case(
        op="ms_deform_attn3d",
        name="self",
        work="8 heads, Dh 32, levels 32³ to 4³, 4 points, 37,440 queries, locations anywhere",
        make=ms_deform.make,
        sizes={"levels": LEVELS},
        quick={"levels": QUICK_LEVELS, "heads": 2, "channels": 8},
        forward_bars=(at_least(8), Bar("extra_of_results", 0.05)),
        backward_bars=(at_least(8), Bar("extra_of_results", 0.05)),
        anisotropic={"levels": ANISOTROPIC_LEVELS},
        quick_anisotropic={"levels": QUICK_ANISOTROPIC_LEVELS},
    ),
    Case(
        op="ms_deform_attn3d",
        name="self_local",
        work="the same, locations within a few voxels of the query's own",
        make=ms_deform.make,
        sizes={"levels": LEVELS, "is_local": True},
        quick={"levels": QUICK_LEVELS, "heads": 2, "channels": 8, "is_local": True},
    ),
    Case(
        op="ms_deform_attn3d",
        name="cross",
        work="the same value, 300 queries, locations anywhere",
        make=ms_deform.make,
        sizes={"levels": LEVELS, "queries": 300},
        quick={"levels": QUICK_LEVELS, "heads": 2, "channels": 8, "queries": 10},
        forward_bars=(at_least(5),),
        backward_bars=(at_least(2),),
        anisotropic={"levels": ANISOTROPIC_LEVELS},
        quick_anisotropic={"levels": QUICK_ANISOTROPIC_LEVELS},
    ),
    Case(
        op="layer_norm",
        name="maps",
        work="147,456 rows of 64 channels, against torch's own layer_norm",
        make=layer_norm.make,
        sizes={"rows": 147_456, "channels": 64},
        quick={"rows": 100, "channels": 64},
        forward_bars=(at_least(1),),
        backward_bars=(at_least(1),),
        has_bfloat16=True,
    ),
    Case(
        op="group_norm",
        name="maps",
        work="[2,32,32,48,48] in 8 groups and a ReLU, against torch's own group_norm and relu_",
        make=group_norm.make,
        sizes={"shape": (2, 32, 32, 48, 48), "groups": 8},
        quick={"shape": (2, 16, 3, 4, 5), "groups": 8},
        forward_bars=(at_least(1),),
        backward_bars=(at_least(1.6),),
        has_bfloat16=True,
    ),
]
