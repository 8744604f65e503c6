"""What a loop over several processes needs beside the optimizer: how FSDP2 shall cut a model, what DDP shall leave alone, and
whether copies are still the same."""

from subspan.optim.copies import check_copies, ignore_projected
from subspan.optim.shards import shard_along

__all__ = ["check_copies", "ignore_projected", "shard_along"]
