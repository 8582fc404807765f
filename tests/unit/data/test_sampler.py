"""The order of prompts is complete, reproducible and resumable; seeds are stable and distinct."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_intuitor.data import PromptSampler, sample_seed

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40)).filter(lambda s: s[1] <= s[0])


@settings(deadline=None, max_examples=200)
@given(shape=SHAPES, seed=st.integers(0, 2**40), shuffle=st.booleans(), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_prompt_once(shape, seed, shuffle, epochs):
    count, per_step = shape
    sampler = PromptSampler(count, per_step, seed, shuffle)
    taken: list[int] = []
    while len(taken) < epochs * count:
        assert sampler.epoch == len(taken) // count
        step = sampler.take()
        assert len(step) == per_step
        taken += step
    for epoch in range(epochs):
        stretch = taken[epoch * count : (epoch + 1) * count]
        assert sorted(stretch) == list(range(count))
        assert shuffle or stretch == list(range(count))


@settings(deadline=None, max_examples=200)
@given(shape=SHAPES, seed=st.integers(0, 99), shuffle=st.booleans(), before=st.integers(0, 12), new=st.integers(1, 9))
def test_resuming_goes_on_exactly_even_with_another_step_size(shape, seed, shuffle, before, new):
    count, per_step = shape
    new = min(new, count)
    sampler = PromptSampler(count, per_step, seed, shuffle)
    for _ in range(before):
        sampler.take()
    state = sampler.state()
    resumed = PromptSampler.from_state(state, count=count, prompts_per_step=new, seed=seed, shuffle=shuffle)
    unbroken = PromptSampler(count, 1, seed, shuffle)
    everything = [unbroken.take()[0] for _ in range(before * per_step + 3 * new)]
    assert [i for _ in range(3) for i in resumed.take()] == everything[before * per_step :]


def test_epochs_and_seeds_have_their_own_permutation():
    orders = [PromptSampler(50, 50, seed, True, position=epoch * 50).take() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_the_order_is_the_same_in_every_process():
    # Written down once: a checkpoint of an older version must resume into the same order.
    assert PromptSampler(8, 8, 0, True).take() == [6, 2, 4, 5, 1, 7, 3, 0]
    assert sample_seed(0, 1, "train:0", 0) == 165517374


def test_shuffled_prompts_are_spread_evenly():
    firsts = Counter(PromptSampler(5, 1, seed, True).take()[0] for seed in range(1000))
    assert all(140 < n < 260 for n in firsts.values())


@pytest.mark.parametrize(("changed", "value"), [("count", 11), ("seed", 1), ("shuffle", False)])
def test_a_changed_order_is_not_resumed(changed, value):
    now = {"count": 10, "seed": 0, "shuffle": True}
    state = PromptSampler(10, 2, 0, True).state()
    with pytest.raises(ValueError, match=changed):
        PromptSampler.from_state(state, prompts_per_step=2, **{**now, changed: value})


def test_more_prompts_a_step_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.prompts_per_step is 4.* only 3"):
        PromptSampler(3, 4, 0, True)


def test_seeds_are_distinct_and_31_bit():
    seeds = [
        sample_seed(run, step, f"train:{prompt}", sample)
        for run in range(3)
        for step in (-2, -1, 0, 1, 2, 11)
        for prompt in range(40)
        for sample in range(8)
    ]
    assert all(0 <= seed < 2**31 for seed in seeds)
    # 5,760 draws out of 2**31 collide 0.008 times on average.
    assert len(set(seeds)) >= len(seeds) - 1


def test_neighbouring_parts_of_a_seed_are_kept_apart():
    assert sample_seed(1, 11, "a:1", 1) != sample_seed(11, 1, "a:1", 1)
    assert sample_seed(0, 1, "a:1", 11) != sample_seed(0, 1, "a:11", 1)
