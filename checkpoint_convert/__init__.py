"""Thin commands between Hugging Face folders and Megatron checkpoints, over ``megatron_intuitor.models``."""
