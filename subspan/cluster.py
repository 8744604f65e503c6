"""Plans of several processes: the memory of each, and what it sends in a step, on nodes that nobody has to own.

FSDP2 and the optimizer are the real ones here too (plan.py), and so are their collectives, which run over torch's "fake" process
group: it has one real process and moves nothing. Only what DistributedDataParallel sends is written down: a sum of the gradients
in its buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from subspan.checks import check_whole
from subspan.memory import GIB
from subspan.plan import Planner
from subspan.traffic import Payload, sent
from subspan.training.config import ParallelConfig, TrainConfig

WORDS = {
    "passes": "weights and gradients",
    "optimizer": "optimizer",
    "refreshes": "refreshes, mean over T",
}


@contextmanager
def pretended(parallel: ParallelConfig) -> Iterator[None]:
    """Inside, this process is the first of `parallel.count`, and the others seem to be there. What was planned inside ends with
    it. ValueError: there is a process group already."""
    if parallel.count == 1:
        yield
        return
    if dist.is_initialized():
        raise ValueError("a plan of several processes has to pretend a process group, and there is one: plan elsewhere")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=0, world_size=parallel.count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def layout(nodes: int, gpus_per_node: int, shard: int | None = None) -> ParallelConfig:
    """All processes in `shard` parts (None: each has one), as many copies as that leaves. ValueError: parts left over, or a
    number below 1."""
    check_whole("shard", shard, minimum=1, optional=True)
    check_whole("nodes", nodes, minimum=1)
    check_whole("gpus_per_node", gpus_per_node, minimum=1)
    count = nodes * gpus_per_node
    shard = count if shard is None else shard
    if count % shard:
        raise ValueError(
            f"shard={shard} does not divide the {count} processes of nodes={nodes} times gpus_per_node={gpus_per_node}: change "
            "one of them"
        )
    return ParallelConfig(shard, count // shard)


@dataclass(frozen=True)
class Sent:
    """Bytes that a process sends: within its node, and where others of the collective are on another node."""

    within: float = 0
    between: float = 0


def sent_of(payload: Payload, gpus_per_node: int) -> Sent:
    """What the first process sends for `payload` in rings, processes numbered node by node, as torchrun does."""
    within = between = 0.0
    for (kind, ranks), size in payload.items():
        if len({rank // gpus_per_node for rank in ranks}) > 1:
            between += sent(kind, size, len(ranks))
        else:
            within += sent(kind, size, len(ranks))
    return Sent(within, between)


def plan_traffic(planner: Planner, config: TrainConfig, gpus_per_node: int) -> dict[str, Sent]:
    """Bytes that a process sends in a step, by what for (`WORDS`). Inside `pretended(config.parallel)`."""
    return {name: sent_of(payload, gpus_per_node) for name, payload in planner.traffic(config).items()}


def describe_layout(parallel: ParallelConfig, gpus_per_node: int) -> str:
    """In words."""
    nodes = -(-parallel.count // gpus_per_node)
    parts = f"{parallel.shard} parts" if parallel.shard > 1 else "whole"
    copies = f", {parallel.replicate} copies" if parallel.replicate > 1 else ""
    return f"{parallel.count} processes on {nodes} node{'s' if nodes > 1 else ''}: {parts}{copies}"


def describe_traffic(traffic: Mapping[str, Sent]) -> str:
    """A table."""
    lines = [f"  {'a process sends in a step':<26}{'within its node':>18}{'between nodes':>18}"]
    total = Sent(sum(s.within for s in traffic.values()), sum(s.between for s in traffic.values()))
    for name, row in {**{WORDS[key]: row for key, row in traffic.items()}, "in all": total}.items():
        lines.append(f"    {name:<24}{row.within / GIB:14.4f} GiB{row.between / GIB:14.4f} GiB")
    return "\n".join(lines)


def as_dict(parallel: ParallelConfig, gpus_per_node: int, traffic: Mapping[str, Sent]) -> dict[str, Any]:
    """Plain values for JSON, in bytes."""
    sizes = {name: {"within": round(row.within), "between": round(row.between)} for name, row in traffic.items()}
    return {
        "shard": parallel.shard,
        "replicate": parallel.replicate,
        "gpus_per_node": gpus_per_node,
        "sent": sizes,
    }
