"""Tensor parallelism: one model held and run by several processes, each with some heads and some of the MLP."""

from larosa.parallel.lead import Lead
from larosa.parallel.ranks import Over, Ranks, start, started, this_rank
from larosa.parallel.shard import Shard, empty_shard, shard_of, whole_config

__all__ = ["Lead", "Over", "Ranks", "Shard", "empty_shard", "shard_of", "start", "started", "this_rank", "whole_config"]
