"""Plans and packed micro batches keep every sample, every limit and the prediction shift."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_intuitor.contracts import Batch, Prompt, Rollout, RolloutGroup
from megatron_intuitor.data import pack, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def make_batch(sizes: list[tuple[int, int]], groups: int = 1) -> Batch:
    """A batch of (prompt, response) lengths in which every token is unique."""
    token = iter(range(10_000))
    made = []
    for group in range(groups):
        for prompt, response in sizes:
            question = Prompt("t:0", "q", "q", tuple(next(token) for _ in range(prompt)))
            ids = tuple(next(token) for _ in range(response))
            rollout = Rollout(ids, tuple(-float(t) for t in ids), (group,) * response, "stop")
            made.append(RolloutGroup(question, (rollout,)))
    return Batch.from_groups(made)


@settings(deadline=None, max_examples=300)
@given(lengths=LENGTHS, slack=st.integers(0, 100), ranks=st.integers(1, 5))
def test_a_plan_keeps_every_promise(lengths, slack, ranks):
    # A multiple of the ranks can always be planned.
    lengths = lengths * ranks
    limit = max(lengths) + slack
    plan = plan_micro_batches(lengths, max_tokens=limit, data_parallel_size=ranks)

    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    micro_batches = [micro for rank in plan for micro in rank]
    assert sorted(i for micro in micro_batches for i in micro) == list(range(len(lengths)))
    assert all(micro_batches)
    tokens = [sum(lengths[i] for i in micro) for micro in micro_batches]
    assert max(tokens) <= limit
    assert max(tokens) - min(tokens) <= max(lengths)
    per_rank = [sum(lengths[i] for micro in rank for i in micro) for rank in plan]
    assert max(per_rank) - min(per_rank) <= max(lengths)
    assert plan == plan_micro_batches(list(lengths), max_tokens=limit, data_parallel_size=ranks)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), ranks=st.integers(1, 4))
def test_one_micro_batch_a_rank_where_all_fits(lengths, ranks):
    lengths = lengths * ranks
    plan = plan_micro_batches(lengths, max_tokens=sum(lengths), data_parallel_size=ranks)
    assert [len(rank) for rank in plan] == [1] * ranks


def test_a_plan_does_not_waste_micro_batches():
    # 6 x 5 tokens fill three micro batches of 10 exactly.
    assert plan_micro_batches([5] * 6, max_tokens=10, data_parallel_size=1) == [[[0, 3], [1, 4], [2, 5]]]


@pytest.mark.parametrize(
    ("lengths", "limit", "ranks", "message"),
    [
        ([5, 11, 3], 10, 1, r"11 tokens does not fit train\.micro_batch_tokens \(10\)"),
        ([5, 5], 10, 3, "2 samples cannot feed 3 data ranks"),
        ([], 10, 1, "0 samples"),
        ([10] * 5, 10, 2, r"raise train\.micro_batch_tokens"),
    ],
)
def test_impossible_plans_are_refused(lengths, limit, ranks, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(lengths, max_tokens=limit, data_parallel_size=ranks)


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(sizes=SIZES, multiple=st.integers(1, 16), data=st.data())
def test_packed_rows_predict_the_response_tokens(sizes, multiple, data):
    batch = make_batch(sizes)
    chosen = data.draw(st.permutations(range(len(batch))))[: data.draw(st.integers(1, len(batch)))]
    packed = pack(batch, chosen, pad_to_multiple=multiple)

    tokens, positions = packed.token_ids[0], packed.position_ids[0]
    total = sum(batch.sequence_lengths[i] for i in chosen)
    assert len(tokens) == -(-total // multiple) * multiple == len(positions)
    bounds = packed.cu_seqlens.tolist()
    assert packed.cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == len(tokens)
    assert len(bounds) - 1 == len(chosen) + (len(tokens) > total)
    assert packed.max_seqlen == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    for a, b in zip(bounds, bounds[1:], strict=False):
        assert positions[a:b].tolist() == list(range(b - a))
    for place, i in enumerate(chosen):
        own = tokens[bounds[place] : bounds[place + 1]].tolist()
        assert own == [*batch.prompt_ids[i], *batch.response_ids[i]]

    assert tokens[packed.rows + 1].equal(packed.targets)
    assert packed.targets.tolist() == [t for i in chosen for t in batch.response_ids[i]]
    assert packed.sample_index.tolist() == [i for i in chosen for _ in batch.response_ids[i]]
    # Log-probs were made from the token, so this shows that flat_index points at the same token.
    assert batch.rollout_log_prob[packed.flat_index].equal(-packed.targets.float())
    assert packed.rows.dtype == packed.targets.dtype == packed.flat_index.dtype == tokens.dtype == torch.int64


def test_the_docstring_example():
    batch = make_batch([(2, 3), (1, 2)])
    packed = pack(batch, [0, 1], pad_to_multiple=5)
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 10]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert packed.rows.tolist() == [1, 2, 3, 5, 6]
    assert packed.max_seqlen == 5
    assert pack(batch, [0, 1], pad_to_multiple=4).cu_seqlens.tolist() == [0, 5, 8]


@settings(deadline=None)
@given(sizes=SIZES, limit=st.integers(24, 80), ranks=st.integers(1, 3))
def test_a_packed_plan_covers_every_response_token_once(sizes, limit, ranks):
    batch = make_batch(sizes, groups=ranks)
    plan = plan_micro_batches(batch.sequence_lengths, max_tokens=limit, data_parallel_size=ranks)
    covered = torch.cat([pack(batch, micro).flat_index for rank in plan for micro in rank])
    assert covered.sort().values.equal(torch.arange(batch.response_tokens))
