"""What of the documents is not executed, each with its reason. Nothing else may be left out."""

NOT_EXECUTED = {
    "git clone": "needs a network",
    "pip": "needs a network, or wheels; the extras' names are compared with pyproject.toml",
    "python -c": "copies bundles out of an installed wheel; tests/install installs one",
    "scripts/build_wheels": "builds wheels; tests/install does",
    "napari": "opens a window; tests/view draws the same layers",
    "ray": "starts a cluster; tests/engine trains in one",
    "sbatch": "needs Slurm; tests/test_cluster_scripts.py runs the script",
    "kubectl": "needs Kubernetes; tests/test_cluster_scripts.py reads the file",
    "torchrun": "starts processes; tests/bundles/test_torchrun.py runs this bundle so",
    "unzip": "no command of this package; the zip is unpacked by Python",
    "scripts/quickstart": "takes minutes; continuous integration runs it",
    "scripts/build_docs": "takes a minute; tests/test_build_docs.py runs it",
    "scripts/cluster/by_hand": "needs ssh; tests/test_cluster_scripts.py runs it",
    "scripts/figure_synthesis_match": "draws a figure of data that are not here; its --help has its flags",
    "seg3d train ...": "stands for the last line that `seg3d annotate import` prints, which a test of its own runs",
}
"""First words of a command, and why it is not executed."""

CHECKED_ONLY = {
    "docs/cluster.md": {
        "deepspeed_zero3": "DeepSpeed in four processes: the configuration is checked; test_ray_zero3.py trains",
    }
}
"""Of a page: a word of a command whose configuration is merged and checked, but not run."""
