"""Prompts in, packed micro batches out: readers, prompt templates, sampling order and packing."""

from megatron_intuitor.data.packing import PackedMicroBatch, pack, plan_micro_batches
from megatron_intuitor.data.reader import Row, read_rows
from megatron_intuitor.data.sampler import PromptSampler, sample_seed
from megatron_intuitor.data.templates import load_prompts, load_tokenizer

__all__ = [
    "PackedMicroBatch",
    "PromptSampler",
    "Row",
    "load_prompts",
    "load_tokenizer",
    "pack",
    "plan_micro_batches",
    "read_rows",
    "sample_seed",
]
