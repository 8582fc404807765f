"""The command line; light to import, so that a wrong config is refused in under a second."""

from megatron_intuitor.cli.main import main

__all__ = ["main"]
