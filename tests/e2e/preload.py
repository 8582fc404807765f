"""What the fork server imports once for all runs; see `runs`."""

from megatron_intuitor.platform import prepare_megatron

prepare_megatron()

import megatron_intuitor.trainer  # noqa: E402, F401
