"""Recipes by name: two instruments, a stain of membranes, and everything at once."""

from typing import Any

from seg3d_monai.data.synthesis.scene import Recipe

_SHAPES = {
    "diameter_um": [8.0, 16.0],
    "spread": [0.05, 0.25],
    "fill": [0.03, 0.5],
    "attach": [0.0, 0.9],
    "closeness": [0.75, 1.0],
    "axis_ratio": [1.1, 1.9],
    "deformation": [0.0, 0.14],
    "ellipsoid": 1.0,
    "elongated": [0.0, 0.3],
    "lobed": [0.0, 0.2],
    "dividing": [0.0, 0.1],
    "outline": 3.0,
    "margin": 0.5,
}
_NUCLEI = {
    "brightness_spread": [0.1, 0.5],
    "hollow": [-0.5, 0.3],
    "texture": [0.05, 0.4],
    "texture_um": [1.2, 3.0],
    "nucleoli": [0.0, 0.15],
    "seam": [0.3, 0.9],
    "seam_share": [0.05, 0.3],
}
_CAMERA = {
    "photons": [20.0, 1000.0],
    "gain": [0.5, 4.0],
    "offset": [50.0, 2000.0],
    "read_noise": [1.0, 8.0],
    "white_level": [2.0, 20.0],
    "bits": [12.0, 16.0],
    "least_contrast": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "lightsheet_nuclei": {
        "depth_um": [0.0, 200.0],
        "voxels": {"plane_um": [0.5, 1.2], "anisotropy": [1.5, 5.0]},
        "objects": _SHAPES,
        "stain": _NUCLEI,
        "background": {
            "glow": [0.02, 0.2],
            "specks": [0.0, 0.5],
            "speck_brightness": [0.5, 3.0],
            "fibres": [0.0, 2.0],
            "fibre_brightness": [0.1, 0.8],
        },
        "optics": {
            "psf_um": [0.35, 0.9],
            "psf_ratio": [2.0, 5.0],
            "scatter": [1.2, 2.5],
            "attenuation_um": [80.0, 500.0],
            "haze": [0.0, 0.5],
            "haze_um": [6.0, 15.0],
            "sheet_end": [0.0, 0.7],
            "tilt_degrees": [-6.0, 6.0],
            "vignetting": [0.0, 0.4],
            "stripes": [0.0, 0.2],
            "stripe_um": [2.0, 8.0],
        },
        "camera": _CAMERA,
    },
    "confocal_nuclei": {
        "depth_um": [0.0, 60.0],
        "voxels": {"plane_um": [0.2, 1.0], "anisotropy": [1.5, 5.0]},
        "objects": _SHAPES,
        "stain": _NUCLEI,
        "background": {"glow": [0.01, 0.15], "specks": [0.0, 0.5], "speck_brightness": [0.5, 3.0]},
        "optics": {
            "psf_um": [0.2, 0.6],
            "psf_ratio": [2.5, 6.0],
            "scatter": [1.1, 2.0],
            "attenuation_um": [30.0, 200.0],
            "haze": [0.0, 0.25],
            "sheet_end": 0.0,
            "vignetting": [0.0, 0.2],
            "stripes": 0.0,
        },
        "camera": {**_CAMERA, "photons": [8.0, 300.0], "offset": [0.0, 2000.0], "bits": [8.0, 16.0]},
    },
    "membrane": {
        "depth_um": [0.0, 100.0],
        "voxels": {"plane_um": [0.2, 1.0], "anisotropy": [1.0, 4.0]},
        "objects": {
            **_SHAPES,
            "fill": [0.5, 0.9],
            "attach": [0.5, 0.9],
            "closeness": [0.7, 0.85],
            "reach": [1.2, 2.0],
            "dividing": 0.0,
            "outline": 0.0,
            "margin": 0.0,
        },
        "stain": {
            "nucleus": [0.0, 0.1],
            "membrane": 1.0,
            "membrane_um": [0.6, 1.6],
            "brightness_spread": [0.1, 0.4],
            "texture": [0.0, 0.3],
        },
        "background": {"glow": [0.01, 0.15], "specks": [0.0, 0.3], "speck_brightness": [0.5, 2.0]},
        "optics": {
            "psf_um": [0.2, 0.6],
            "psf_ratio": [2.0, 5.0],
            "scatter": [1.1, 2.0],
            "attenuation_um": [50.0, 300.0],
            "haze": [0.0, 0.3],
            "stripes": [0.0, 0.1],
        },
        "camera": {**_CAMERA, "bits": [8.0, 16.0]},
    },
    "randomised": {
        "depth_um": [0.0, 200.0],
        "voxels": {"plane_um": [0.4, 1.0], "anisotropy": [1.0, 4.0]},
        "objects": {
            **_SHAPES,
            "diameter_um": [8.0, 20.0],
            "spread": [0.0, 0.35],
            "fill": [0.02, 0.6],
            "closeness": [0.7, 1.1],
            "reach": [1.0, 1.3],
            "axis_ratio": [1.0, 2.2],
            "deformation": [0.0, 0.2],
            "elongated": [0.0, 0.6],
            "lobed": [0.0, 0.4],
            "dividing": [0.0, 0.2],
        },
        "stain": {
            **_NUCLEI,
            "brightness_spread": [0.0, 0.7],
            "hollow": [-0.7, 0.7],
            "texture": [0.0, 0.8],
            "texture_um": [1.0, 6.0],
            "nucleoli": [0.0, 0.25],
            "seam": [0.1, 1.0],
            "cytoplasm": [0.0, 0.3],
        },
        "background": {
            "glow": [0.0, 0.4],
            "glow_spread": [0.1, 0.8],
            "glow_um": [10.0, 50.0],
            "specks": [0.0, 1.5],
            "speck_um": [0.5, 2.0],
            "speck_brightness": [0.3, 3.0],
            "fibres": [0.0, 4.0],
            "fibre_um": [2.0, 10.0],
            "fibre_brightness": [0.1, 1.0],
        },
        "optics": {
            "psf_um": [0.2, 1.2],
            "psf_ratio": [1.5, 8.0],
            "scatter": [1.0, 3.0],
            "attenuation_um": [30.0, 1000.0],
            "haze": [0.0, 0.8],
            "haze_um": [5.0, 20.0],
            "sheet_end": [0.0, 1.0],
            "tilt_degrees": [-10.0, 10.0],
            "vignetting": [0.0, 0.6],
            "stripes": [0.0, 0.3],
            "stripe_um": [2.0, 10.0],
        },
        "camera": {
            "photons": [5.0, 2000.0],
            "gain": [0.3, 6.0],
            "offset": [0.0, 4000.0],
            "read_noise": [0.0, 12.0],
            "white_level": [1.5, 20.0],
            "bits": [8.0, 16.0],
            "grain": [0.0, 1.5],
            "grain_axial": [0.0, 1.0],
            "least_contrast": 1.0,
        },
    },
}


def preset(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; choose one of {', '.join(PRESETS)}, or give a JSON file")
    ranges = {key: value for key, value in PRESETS[name].items() if key != "depth_um"}
    return Recipe(ranges, PRESETS[name]["depth_um"])
