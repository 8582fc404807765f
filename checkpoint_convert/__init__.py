"""Thin commands between Hugging Face folders and Megatron checkpoints; the weight map is in megatron_intuitor.models."""
