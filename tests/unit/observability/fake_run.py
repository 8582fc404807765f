"""A run folder with realistic numbers, written through the public API."""

from __future__ import annotations

import math
import random
from pathlib import Path

import yaml

from megatron_intuitor.config.schema import RunConfig
from megatron_intuitor.observability import Observer, SampleRow

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\x1b[31m\u202e$x$ {{ 7*7 }} & 'quoted\""


def make_config(**sections: object) -> RunConfig:
    tree: dict[str, object] = {
        "model": {"path": "models/tiny"},
        "data": {"path": "data.jsonl"},
        "rewards": {"accuracy": {"weight": 0.0}},
        "evaluation": {"every": 5},
        "logging": {"tensorboard": False},
    }
    return RunConfig.model_validate({**tree, **sections})


def step_metrics(step: int, rng: random.Random) -> dict[str, float]:
    rise = 1 / (1 + math.exp(-(step - 5) / 2))
    return {
        "reward/self_certainty/mean": 1.8 + 0.8 * rise + rng.gauss(0, 0.05),
        "reward/self_certainty/std_in_group": 0.3 - 0.2 * rise,
        "reward/accuracy/mean": 0.45 + 0.4 * rise,
        "reward/self_certainty/flat_groups": 0.1 * rise,
        "reward/accuracy/flat_groups": 0.4 * rise,
        "rollout/importance_weight": 1.0 + 0.01 * rise,
        "policy/entropy": 0.5 - 0.3 * rise,
        "policy/self_certainty": 1.8 + 0.8 * rise,
        "policy/kl": 0.003 * step,
        "policy/grad_norm": math.nan if step == 3 else rng.random(),
        "loss/total": rng.gauss(0, 0.02),
        "rollout/length": 14.2 + step,
        "rollout/length_max": 31.0,
        "rollout/log_prob_diff_mean": 3e-6,
        "rollout/log_prob_diff_max": 4e-5,
        "time/rollout_s": 1.2,
        "time/score_s": 0.3,
        "time/update_s": 0.9,
        "time/update/forward_s": 0.4,
        "time/step_s": 2.5,
        "optimizer/lr": 1e-4,
        "surprise/<b>unknown</b>": 2.0,
    }


def evaluation_metrics(progress: float) -> dict[str, float]:
    return {
        "greedy_accuracy": 0.68 + 0.3 * progress,
        "sampled_accuracy": 0.45 + 0.4 * progress,
        "shows_steps": 0.36 + 0.6 * progress,
        "self_certainty": 1.81 + 0.7 * progress,
        "entropy": 0.52 - 0.37 * progress,
        "length": 13.9 + 10 * progress,
    }


def sample(index: int, response: str = "1+2=3;#3$") -> SampleRow:
    return SampleRow(
        prompt_id=f"arithmetic:{index}",
        prompt="1+2=",
        response=response,
        answer="3",
        rewards={"self_certainty": 1.83, "accuracy": float(index % 2)},
        advantage=0.5 - index % 2,
        length=len(response),
        finish_reason="stop",
        self_certainty=1.83,
        entropy=0.21,
    )


def named(metrics: dict[str, float]) -> dict[str, float]:
    return {f"eval/held_out/{name}": value for name, value in metrics.items()}


def write_run(folder: Path, steps: int = 10) -> Path:
    config, rng = make_config(), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with Observer(config, folder, is_driver=True, rank=0) as observer:
        observer.header({"parameters": "0.3 M"})
        observer.evaluation(0, named(evaluation_metrics(0.0)), 0)
        for step in range(1, steps + 1):
            metrics = step_metrics(step, rng)
            if step % 5 == 0:
                metrics |= named(evaluation_metrics(step / steps))
            rows = [sample(i, HOSTILE if (step, i) == (1, 0) else f"answer {step}.{i}") for i in range(8)]
            observer.samples(step, step, rows)
            observer.step(step, steps, metrics, step)
        observer.finish(
            evaluation_metrics(0.0), evaluation_metrics(1.0), {"checkpoint": folder / "checkpoints/step_10"}
        )
    return folder
