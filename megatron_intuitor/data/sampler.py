"""Which prompts a step takes and with which seeds: pure functions of the run's seed and a position.

Nothing random is stored, so a run resumes exactly from one number.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

SEED_BITS = 31


def _stable_hash(*parts: object) -> int:
    """A hash that is the same in every process, unlike `hash`; parts are kept apart so that ('1', 2) != (1, '2')."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def sample_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one response, in ``[0, 2**31)``: the same request has the same seed in every run and layout.

    Training passes the step that the response is for, from 1; an evaluation passes the negative of its step so that
    it never shares a seed with training.  Where a prompt comes twice in one step (two epochs meet there), its second
    group must go on counting samples where the first one ended, or both groups would hold the same responses.
    """
    return _stable_hash("sample", run_seed, step, prompt_id, sample_index) >> (64 - SEED_BITS)


@dataclass
class PromptSampler:
    """Takes ``prompts_per_step`` prompts a step out of ``count``, epoch after epoch.

    Prompts are laid out as one endless sequence, epoch by epoch; with ``shuffle`` each epoch has its own permutation.
    A step takes the next stretch of it.  So a step that straddles two epochs neither loses nor repeats a prompt of
    either epoch (the same prompt can come twice in such a step, once for each epoch).

    Raises:
        ValueError: there are no prompts, or fewer than one step takes.
    """

    count: int
    prompts_per_step: int
    seed: int
    shuffle: bool
    position: int = 0
    """Number of prompts taken so far; all the state there is."""
    _permutation: tuple[int, list[int]] = field(default=(-1, []), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.count < self.prompts_per_step:
            raise ValueError(
                f"rollout.prompts_per_step is {self.prompts_per_step}, but the data has only {self.count} usable "
                "prompts; lower it or add prompts"
            )

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next prompt belongs to."""
        return self.position // self.count

    def take(self) -> list[int]:
        """Indices of the next step's prompts; moves on by ``prompts_per_step``."""
        start, self.position = self.position, self.position + self.prompts_per_step
        return [self._order(p // self.count)[p % self.count] for p in range(start, self.position)]

    def state(self) -> dict[str, int]:
        """What a checkpoint must keep to go on exactly here."""
        return {"position": self.position, "count": self.count, "seed": self.seed, "shuffle": int(self.shuffle)}

    @classmethod
    def from_state(
        cls, state: dict[str, int], *, count: int, prompts_per_step: int, seed: int, shuffle: bool
    ) -> PromptSampler:
        """Go on where ``state`` was taken; ``prompts_per_step`` may have changed since.

        Raises:
            ValueError: the number of prompts, the seed or the shuffling changed, so the order would differ.
        """
        now = {"count": count, "seed": seed, "shuffle": int(shuffle)}
        changed = [f"{name} {state[name]} -> {value}" for name, value in now.items() if state[name] != value]
        if changed:
            raise ValueError(
                f"the order of prompts cannot be resumed, it changed since the checkpoint: {', '.join(changed)}; "
                "restore data.path, data.shuffle, data.max_prompt_tokens and seed, or start a new run"
            )
        return cls(count, prompts_per_step, seed, shuffle, position=state["position"])

    def _order(self, epoch: int) -> list[int]:
        """The order of one epoch's prompts; the last one asked for is kept."""
        if self._permutation[0] != epoch:
            order = list(range(self.count))
            if self.shuffle:
                random.Random(_stable_hash("epoch", self.seed, epoch)).shuffle(order)
            self._permutation = (epoch, order)
        return self._permutation[1]
