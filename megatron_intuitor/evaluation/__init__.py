"""What a model is worth on problems that it was not trained on."""

from megatron_intuitor.evaluation.held_out import HeldOut

__all__ = ["HeldOut"]
