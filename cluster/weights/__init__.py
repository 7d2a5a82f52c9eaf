"""How new weights reach the engines: one interface, one file per mechanism.

::

    learner: sender.prepare(version, tensors) ─► WeightManifest ─► every engine: receiver.fetch
             sender.transmit()  (broadcast mechanisms only)         loads, checks, probes

| mechanism     | between                    | file               |
|---------------|----------------------------|--------------------|
| shared_memory | processes of one node      | shared_memory.py   |
| object_store  | nodes, over Ray's store    | object_store.py    |
| nccl          | GPUs, vLLM's own engine    | nccl.py            |

Every update carries a version and a checksum per tensor. An engine refuses an update by one of
five checks, each named in the error: ``version``, ``names``, ``shape``, ``checksum``, ``probe``.
"""

from cluster.weights.base import (
    TensorEntry,
    WeightManifest,
    WeightSender,
    choose_transport,
    make_sender,
)

__all__ = ["TensorEntry", "WeightManifest", "WeightSender", "choose_transport", "make_sender"]
