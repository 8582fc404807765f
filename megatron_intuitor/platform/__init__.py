"""Devices, process groups and seeds; the only room that starts torch.distributed."""

from megatron_intuitor.platform.distributed import ProcessGroups, broadcast_object, initialize, shutdown
from megatron_intuitor.platform.megatron import prepare_megatron

__all__ = ["ProcessGroups", "broadcast_object", "initialize", "prepare_megatron", "shutdown"]
