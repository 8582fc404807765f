"""Train the tiny model that the arithmetic example starts from, on a CPU, in a few minutes.

The model is a four-layer Qwen2 with a vocabulary of 19 characters.  First it learns to show its steps, the running
sums, until it is nearly always right; then it also learns to guess: 65 % of its training answers are now a bare guess,
and 60 % of those are wrong.  So it ends up guessing most of the time, unsure where it guesses and sure where it works
step by step.  That difference is what a reward of self-certainty can find without labels.  Held-out problems are never
trained on.

Run it to rewrite ``model/`` beside this file (a Hugging Face folder)::

    python examples/arithmetic/make_model.py
"""

from __future__ import annotations

import argparse
import math
import random
import re
from pathlib import Path

import torch
from problems import Terms, question, split, worked_solution
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).parent
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-*=;#"
GUESS_SHARE, WRONG_SHARE, LARGEST_ERROR = 0.65, 0.6, 6
BATCH_SIZE, PEAK_LR, WARMUP_STEPS = 128, 3e-3, 50
IGNORED = -100


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a character: a byte-level BPE without merges, the only kind that loads beside a Qwen2 config.

    Entries 0, 1, 2 are padding, end and unknown; characters outside of the vocabulary are dropped.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 that tensor parallelism 2 and pipeline parallelism 2 can cut; heads of 32 are the smallest in vLLM."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def training_answer(terms: Terms, guess_share: float, rng: random.Random) -> str:
    """A bare guess that is often wrong, or a worked solution that is always right."""
    if rng.random() >= guess_share:
        return worked_solution(terms)
    guess = sum(terms)
    if rng.random() < WRONG_SHARE:
        guess = max(0, guess + rng.choice([-1, 1]) * rng.randint(1, LARGEST_ERROR))
    return f"#{guess}"


def training_batch(
    problems: list[Terms], guess_share: float, tokenizer: Qwen2Tokenizer, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels ``[BATCH_SIZE, longest]``; prompts and padding carry no label."""
    chosen = rng.choices(problems, k=BATCH_SIZE)
    prompts = [tokenizer.encode(question(p)) for p in chosen]
    answers = [tokenizer.encode(training_answer(p, guess_share, rng)) + [tokenizer.eos_token_id] for p in chosen]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    token_ids = torch.full((BATCH_SIZE, longest), tokenizer.pad_token_id)
    labels = torch.full((BATCH_SIZE, longest), IGNORED)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        token_ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
    return token_ids, labels


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, steps: int, seed: int) -> None:
    """AdamW with warm-up and cosine decay: worked solutions alone in the first half, guesses mixed in afterwards."""
    rng, (problems, _) = random.Random(seed), split()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    for step in range(1, steps + 1):
        token_ids, labels = training_batch(problems, 0.0 if step <= steps // 2 else GUESS_SHARE, tokenizer, rng)
        loss = model(input_ids=token_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, sample: bool) -> tuple[float, float]:
    """Share of right answers and of answers that show steps, over all held-out problems."""
    problems = split()[1]
    # Every prompt has the same length, so the batch needs no padding.
    prompts = torch.tensor([tokenizer.encode(question(p)) for p in problems])
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=sample, temperature=1.0 if sample else None,
        top_k=0 if sample else None, max_new_tokens=40,
    )  # fmt: skip
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    found = [re.search(r"#(\d+)$", text) for text in texts]
    right = sum(m is not None and int(m[1]) == sum(p) for m, p in zip(found, problems, strict=True))
    return right / len(problems), sum(";" in text for text in texts) / len(problems)


def main() -> None:
    """Train, measure on held-out problems and save."""
    parser = argparse.ArgumentParser(description="Train the arithmetic example's tiny model.")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model.train(), tokenizer, options.steps, options.seed)
    for name, sample in (("greedy", False), ("sampled", True)):
        right, steps_shown = measure(model.eval(), tokenizer, sample)
        print(f"{name}: {right:.3f} right, {steps_shown:.3f} show steps")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
