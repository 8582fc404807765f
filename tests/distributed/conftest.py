"""Prepares megatron before any multi-rank test imports it."""

from megatron_intuitor.platform import prepare_megatron

prepare_megatron()
