"""Time whole RL steps by phase, and the same steps of TRL's GRPOTrainer where TRL is installed.

    python tools/bench_rl_step.py                          # 0.6 M and 4 M parameters, both engines, TRL beside them
    python tools/bench_rl_step.py --sizes 0.6M --engines transformers --rounds 1

Random Qwen2 models, 16 prompts x 8 samples x 64 tokens, fp32, one thread, no KL term.  The candidates are measured in
turn, round after round, so that a noisy machine hits all of them; a step counts from the third on.  We score every
sample (that is the method), TRL scores nothing at beta 0.  Prints one JSON line a candidate and round, then one a size
with the ratio of median samples per second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS, WARM_UP = 16, 8, 16, 64, 2
ALPHABET = [chr(33 + i) for i in range(90)]


@dataclass(frozen=True)
class Size:
    """Shape of a random Qwen2 model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


SIZES = {"0.6M": Size(128, 256, 4, 4), "4M": Size(256, 640, 6, 8)}


def make_model(folder: Path, size: Size) -> None:
    """Save a random model with a character tokenizer of 512 entries."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(ALPHABET)}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), 512)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=512,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(path: Path) -> None:
    """Write random prompts, each of the same length in tokens."""
    import random

    generator = random.Random(0)
    rows = [{"question": "".join(generator.choices(ALPHABET, k=PROMPT_TOKENS))} for _ in range(512)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def environment() -> dict[str, str]:
    """The environment of every candidate: one thread, no network."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def time_ours(work: Path, engine: str, steps: int, round_index: int) -> dict[str, float]:
    """Run our trainer for some steps; medians over the steps after the warm-up."""
    output = work / f"ours-{engine}-{round_index}"
    config = {
        "model": {"path": str(work / "model"), "precision": "fp32"},
        "data": {"path": str(work / "data.jsonl"), "format": "raw", "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {
            "engine": engine,
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "sampling": {"max_tokens": RESPONSE_TOKENS},
            "probe": {"every": 1000},
        },
        "algorithm": {"loss": {"kl_coefficient": 0.0}},
        "train": {"steps": steps},
        "checkpoint": {"every": 100000, "export": False},
        "logging": {"tensorboard": False},
        "output_dir": str(output),
    }
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run([sys.executable, "-m", "megatron_intuitor", "train", str(path)], work / f"ours-{engine}.log")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > WARM_UP]
    names = [name for name in rows[0] if name.startswith("time/")]
    result = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}
    return result | {"samples_per_s": statistics.median(PROMPTS * SAMPLES / row["time/step_s"] for row in rows)}


TRL_SCRIPT = """
import json, sys, time, datasets, torch
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
model, data, out, steps, prompts, samples, tokens = sys.argv[1:4] + [int(x) for x in sys.argv[4:8]]
torch.set_num_threads(1)
times = []
class Clock(TrainerCallback):
    def on_step_begin(self, *a, **k): times.append(time.perf_counter())
    def on_step_end(self, *a, **k): times[-1] = time.perf_counter() - times[-1]
rows = datasets.load_dataset("json", data_files=data, split="train").rename_column("question", "prompt")
config = GRPOConfig(output_dir=out, use_cpu=True, bf16=False, per_device_train_batch_size=prompts * samples,
                    num_generations=samples, max_completion_length=tokens, temperature=1.0, beta=0.0, max_steps=steps,
                    gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1000,
                    learning_rate=1e-6)
trainer = GRPOTrainer(model=model, reward_funcs=lambda completions, **k: [float(len(c)) for c in completions],
                      args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model),
                      callbacks=[Clock()])
trainer.train()
json.dump(times, open(out + ".json", "w"))
"""


def time_trl(work: Path, steps: int) -> dict[str, float]:
    """Run TRL's GRPOTrainer (transformers generation) on the same model, prompts and lengths."""
    script, out = work / "trl_candidate.py", work / "trl"
    script.write_text(TRL_SCRIPT)
    arguments = [str(work / "model"), str(work / "data.jsonl"), str(out)]
    arguments += [str(x) for x in (steps, PROMPTS, SAMPLES, RESPONSE_TOKENS)]
    run([sys.executable, str(script), *arguments], work / "trl.log")
    times = json.loads(Path(f"{out}.json").read_text())[WARM_UP:]
    return {"time/step_s": statistics.median(times), "samples_per_s": PROMPTS * SAMPLES / statistics.median(times)}


def run(command: list[str], log: Path) -> None:
    """Run a candidate; on failure show the end of what it said."""
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(), check=False).returncode
    if code != 0:
        sys.exit(f"{' '.join(command[:6])} ... failed with {code}:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def has_trl() -> bool:
    """Whether TRL can be measured beside us."""
    import importlib.util

    return importlib.util.find_spec("trl") is not None


def measure(name: str, arguments: argparse.Namespace) -> None:
    """All rounds of one size."""
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", SIZES[name])
        make_data(work / "data.jsonl")
        for round_index in range(arguments.rounds):
            results = {engine: time_ours(work, engine, arguments.steps, round_index) for engine in arguments.engines}
            if has_trl() and not arguments.no_trl:
                results["trl"] = time_trl(work, arguments.steps)
            for candidate, result in results.items():
                rounded = {key: round(value, 3) for key, value in result.items()}
                print(json.dumps({"size": name, "candidate": candidate, "round": round_index, **rounded}), flush=True)
                speeds.setdefault(candidate, []).append(result["samples_per_s"])
    medians = {candidate: statistics.median(values) for candidate, values in speeds.items()}
    rounded = {candidate: round(value, 1) for candidate, value in medians.items()}
    trl = medians.pop("trl", None)
    ratios = {f"{candidate}_over_trl": round(value / trl, 2) for candidate, value in medians.items()} if trl else {}
    print(json.dumps({"size": name, "median_samples_per_s": rounded, **ratios}), flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=["vllm", "transformers"], default=["vllm", "transformers"])
    parser.add_argument("--steps", type=int, default=8, help="steps a candidate and round, two of them warm-up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out even where it is installed")
    arguments = parser.parse_args()
    for name in arguments.sizes:
        measure(name, arguments)


if __name__ == "__main__":
    main()
