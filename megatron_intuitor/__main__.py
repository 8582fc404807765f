"""``python -m megatron_intuitor``: the command line; see `megatron_intuitor.cli`."""

import sys

from megatron_intuitor.cli import main

# Checkpointing starts processes that import this module again: only the first one may run the command line.
if __name__ == "__main__":
    sys.exit(main())
