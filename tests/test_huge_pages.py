"""Large tensors lie on huge pages as soon as the package is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COUNT = """
import resource
import torch
import monai
import seg3d_monai
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(50, 1000, 1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables: str) -> int:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    process = subprocess.run(
        [sys.executable, "-c", COUNT], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return int(process.stdout)


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="huge pages are not on request here"
)
def test_two_hundred_megabytes_take_few_page_faults_unless_the_user_says_no():
    small_pages = 50 * 1000 * 1000 * 4 // 4096
    assert page_faults() < small_pages / 10
    assert page_faults(THP_MEM_ALLOC_ENABLE="0") >= small_pages
