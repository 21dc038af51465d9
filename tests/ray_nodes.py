"""A Ray cluster on this machine whose nodes can be taken away, and what tests of its groups wait for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster

WAIT = 600  # seconds; far more than anything takes, on a busy machine too
RESTART = 90  # seconds from the death of a worker to the next group's first step
STORE = {"object_store_memory": 80 * 2**20}


@contextmanager
def cluster_of(names: str) -> Iterator[Cluster]:
    """A head without CPUs and nodes of one CPU, one a letter, to which this process is connected.

    Workers find the letter of their node in the variable TOY_NODE, tests the nodes in `toy_nodes` of the cluster.
    """
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    made.toy_nodes = {}
    try:
        for name in names:
            add_node(made, name)
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_node(cluster: Cluster, name: str) -> Any:
    """Add a node of one CPU."""
    cluster.toy_nodes[name] = cluster.add_node(num_cpus=1, env_vars={"TOY_NODE": name}, **STORE)
    return cluster.toy_nodes[name]


def wait_until(holds: Callable[[], Any], seconds: float = WAIT) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: if it does not in so many seconds.
    """
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
