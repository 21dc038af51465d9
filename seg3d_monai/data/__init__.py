"""Volumes, the manifest, the crop index, and the crops that training sees."""

from seg3d_monai.data.crop_dataset import CropDataset, VolumeDataset
from seg3d_monai.data.crop_index import CropIndex
from seg3d_monai.data.crop_index_build import build_index
from seg3d_monai.data.crop_records import CropRecord, InstanceTable, VolumeRecord
from seg3d_monai.data.crop_selection import CropSelection
from seg3d_monai.data.data_config import DataConfig
from seg3d_monai.data.intensity import Intensity, check_finite, measure_intensity
from seg3d_monai.data.loader import CropLoader, collate_crops
from seg3d_monai.data.manifest import Manifest, ManifestRow, read_manifest
from seg3d_monai.data.manifest_write import write_manifest
from seg3d_monai.data.sample import dataset_or_sample
from seg3d_monai.data.splits import index_for, split_by_specimen
from seg3d_monai.data.targets import Targets, derive_targets
from seg3d_monai.data.volume import ArrayVolume, Volume, open_volume

__all__ = [
    "ArrayVolume",
    "CropDataset",
    "CropIndex",
    "CropLoader",
    "CropRecord",
    "CropSelection",
    "DataConfig",
    "InstanceTable",
    "Intensity",
    "Manifest",
    "ManifestRow",
    "Targets",
    "Volume",
    "VolumeDataset",
    "VolumeRecord",
    "build_index",
    "check_finite",
    "collate_crops",
    "dataset_or_sample",
    "derive_targets",
    "index_for",
    "measure_intensity",
    "open_volume",
    "read_manifest",
    "split_by_specimen",
    "write_manifest",
]
