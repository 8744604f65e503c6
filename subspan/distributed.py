"""What a loop over several processes needs beside the optimizer: how FSDP2 shall cut a model, what DDP shall leave alone."""

from subspan.optim.copies import ignore_projected
from subspan.optim.shards import shard_along

__all__ = ["ignore_projected", "shard_along"]
