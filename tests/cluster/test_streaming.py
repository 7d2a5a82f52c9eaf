"""Which actors a stream gets. What they do under Ray stands in tests/engine."""

from __future__ import annotations

import pytest

from cluster.streaming import Pool, choose_pool
from rlhf.errors import ResourceError


@pytest.mark.parametrize(
    ("nodes", "use_gpus", "pool"),
    [
        ([{"CPU": 2.0}], True, Pool(1, 1.2, 0)),
        ([{"CPU": 1.0}], True, Pool(1, 0.6, 0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}], True, Pool(2, 2.4, 0)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}], True, Pool(5, 0, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}], False, Pool(1, 4.8, 0)),
    ],
)
def test_an_actor_stands_on_every_gpu_or_else_on_every_node_with_cpus(nodes, use_gpus, pool):
    assert choose_pool(nodes, use_gpus=use_gpus) == pool


def test_a_cluster_without_cpus_is_refused():
    with pytest.raises(ResourceError, match="no node"):
        choose_pool([{"memory": 1.0}], use_gpus=False)
