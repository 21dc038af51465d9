"""The data of a training: a folder of the user's, or the built-in synthetic sample, made on first use."""

import logging
import os
from pathlib import Path

from seg3d_monai.data.synthetic import write_specimen

logger = logging.getLogger(__name__)


def dataset_or_sample(
    dataset_dir: str | os.PathLike[str],
    *,
    sample_dir: str | os.PathLike[str],
    channels: int = 1,
    num_classes: int = 1,
    seed: int = 0,
) -> Path:
    """`dataset_dir` if one is given, else the synthetic sample in `sample_dir`, written unless it is there already.

    Args:
        dataset_dir: a manifest or a folder of volumes; "" for the sample.
        sample_dir: folder of the sample.
        channels: channels of the sample.
        num_classes: classes of the sample.
        seed: seed of the sample.

    Returns:
        Where the volumes are.

    Raises:
        ValueError: `sample_dir` holds something else.
    """
    if str(dataset_dir):
        return Path(dataset_dir)
    logger.info("no dataset_dir is given: training on the built-in synthetic sample in %s", sample_dir)
    return write_specimen(
        sample_dir,
        seed=seed,
        channels=channels,
        num_classes=num_classes,
        test_shape=(64, 160, 160),
        report=logger.info,
    )
