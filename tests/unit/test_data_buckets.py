"""The order of samples of many shapes: batches of one bucket, every sample as often as any other, nothing remembered."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.data import Shape, draws
from megatron_dsp.data.buckets import BucketOrder

SHAPES = [Shape(1, 4, 2, 2), Shape(1, 4, 2, 3), Shape(5, 4, 2, 2), Shape(5, 4, 3, 2)]
some_shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40)
batch_sizes = st.integers(1, 9)
seeds = st.integers(0, 2**64 - 1)


def batches_of_round(shapes, batch):
    return sum(-(-count // batch) for count in Counter(shapes).values())


@given(shapes=some_shapes, batch=batch_sizes, seed=seeds, first=st.integers(0, 10**6))
def test_a_global_batch_is_of_one_bucket(shapes, batch, seed, first):
    order = BucketOrder(shapes, global_batch_size=batch, seed=seed)
    for step in range(first, first + 6):
        assert len({shapes[order[position]] for position in range(step * batch, (step + 1) * batch)}) == 1


@given(shapes=some_shapes, batch=batch_sizes, seed=seeds, rounds=st.integers(1, 4))
def test_rounds_show_every_sample_of_a_bucket_equally_often(shapes, batch, seed, rounds):
    order = BucketOrder(shapes, global_batch_size=batch, seed=seed)
    seen = Counter(order[position] for position in range(rounds * batch * batches_of_round(shapes, batch)))
    for shape, size in Counter(shapes).items():
        times = [seen[index] for index in range(len(shapes)) if shapes[index] == shape]
        assert sum(times) == rounds * -(-size // batch) * batch
        assert min(times) >= rounds
        assert max(times) - min(times) <= 1


@given(shapes=some_shapes, batch=batch_sizes, seed=seeds, positions=st.lists(st.integers(0, 400), max_size=20))
def test_nothing_is_remembered_between_positions(shapes, batch, seed, positions):
    def order():
        return BucketOrder(shapes, global_batch_size=batch, seed=seed)

    used = order()
    assert [used[position] for position in positions] == [order()[position] for position in positions]


@given(size=st.integers(1, 30), batch=batch_sizes, seed=seeds, position=st.integers(0, 10**6))
def test_one_bucket_has_the_plain_order_whatever_the_batch_size(size, batch, seed, position):
    order = BucketOrder(SHAPES[:1] * size, global_batch_size=batch, seed=seed)
    assert order[position] == draws.SampleOrder(size, seed)[position]


def test_a_round_that_the_batch_size_divides_shows_each_sample_once():
    shapes = SHAPES[:1] * 8 + SHAPES[1:2] * 4 + SHAPES[2:3] * 12
    order = BucketOrder(shapes, global_batch_size=4, seed=1)
    for first in (0, 24, 48):
        assert sorted(order[position] for position in range(first, first + 24)) == list(range(24))


def test_buckets_change_from_step_to_step_and_seeds_change_everything():
    shapes = SHAPES * 10
    orders = {seed: BucketOrder(shapes, global_batch_size=2, seed=seed) for seed in range(3)}
    buckets = {seed: [shapes[order[2 * step]] for step in range(40)] for seed, order in orders.items()}
    for seed, of_steps in buckets.items():
        assert sum(one != other for one, other in pairwise(of_steps)) > 20
        assert of_steps[:20] != of_steps[20:], "a round has an order of its own"
        for other in range(seed):
            assert buckets[other] != of_steps
            assert [orders[seed][position] for position in range(8)] != [orders[other][position] for position in range(8)]
    # Buckets of equal size are not walked through in the same order.
    members = {shape: [] for shape in SHAPES}
    for position in range(80):
        index = orders[0][position]
        members[shapes[index]].append(index // len(SHAPES))
    assert len({tuple(walk) for walk in members.values()}) == len(SHAPES)


def test_a_bucket_smaller_than_a_batch_repeats_its_samples():
    order = BucketOrder(SHAPES[:2], global_batch_size=3, seed=0)
    assert sorted(order[position] for position in range(6)) == [0, 0, 0, 1, 1, 1]


def test_values_do_not_change_between_releases():
    order = BucketOrder(SHAPES[:2] * 3, global_batch_size=2, seed=7)
    assert [order[position] for position in range(8, 16)] == [4, 2, 4, 2, 3, 5, 5, 1]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="global_batch_size=0"):
        BucketOrder(SHAPES, global_batch_size=0, seed=0)
    with pytest.raises(ValueError, match="no samples"):
        BucketOrder([], global_batch_size=1, seed=0)
    with pytest.raises(ValueError, match="position=-1"):
        BucketOrder(SHAPES, global_batch_size=1, seed=0)[-1]
