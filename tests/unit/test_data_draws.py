"""Draws by counters: the same under any split over ranks, different for anything they should differ for."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.data import draws


@given(
    total=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**40),
)
def test_noise_is_bitwise_the_same_under_any_split(total, cuts, seed, sample):
    whole = draws.noise(seed, sample, range(total), (3, 2, 5))
    borders = [0, *sorted(min(cut, total) for cut in cuts), total]
    parts = [draws.noise(seed, sample, range(start, stop), (3, 2, 5)) for start, stop in pairwise(borders)]
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat(parts), whole)


def test_noise_differs_over_seeds_samples_and_frames():
    frames = [draws.noise(seed, sample, range(4), (32,)) for seed in (0, 1, 2**63) for sample in (0, 1, 2, 2**33)]
    values = torch.cat(frames).flatten()
    assert len(values.unique()) > 0.99 * len(values)


def test_draws_leave_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    before = draws.noise(0, 0, range(1), (4,)), draws.timestep(0, 0)
    assert (torch.rand(1), np.random.rand()) == expected
    assert torch.equal(draws.noise(0, 0, range(1), (4,)), before[0])
    assert draws.timestep(0, 0) == before[1]


def test_noise_is_standard_normal():
    values = draws.noise(5, 9, range(16), (3, 48, 64)).flatten().double()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    frames = draws.noise(5, 9, range(2), (3, 48, 64)).flatten(1)
    assert abs(torch.corrcoef(frames)[0, 1]) < 0.05


def test_timesteps_are_logit_normal():
    drawn = [draws.timestep(3, sample) for sample in range(4000)]
    assert all(0 < value < 1 for value in drawn)
    logits = torch.tensor([math.log(value / (1 - value)) for value in drawn])
    assert abs(logits.mean()) < 0.06
    assert abs(logits.std() - 1) < 0.05
    assert abs((logits < 1).float().mean() - 0.841) < 0.03


def test_a_timestep_is_shifted_as_if_the_smaller_sample_had_as_much_noise():
    # Stable Diffusion 3 derives the shift from this: n tokens that are all alike hide their value, at time t, by the
    # standard deviation t / (1 - t) / sqrt(n), and that is to be the same for both sizes.
    for timestep in (0.1, 0.5, 0.97):
        for tokens, base in ((256, 64), (64, 256), (300, 7)):
            shifted = draws.shift_timestep(timestep, tokens, base)
            left, right = (t / (1 - t) / math.sqrt(n) for t, n in ((shifted, tokens), (timestep, base)))
            assert left == pytest.approx(right)
        assert draws.shift_timestep(timestep, 64, 64) == draws.shift_timestep(timestep, 64, None) == timestep
    assert (draws.shift_timestep(0.0, 9, 1), draws.shift_timestep(1.0, 9, 1)) == (0, 1)


def test_drops_come_as_often_as_asked():
    assert not any(draws.drop(0, sample, 0.0) for sample in range(100))
    assert all(draws.drop(0, sample, 1.0) for sample in range(100))
    assert 0.07 < np.mean([draws.drop(0, sample, 0.1) for sample in range(3000)]) < 0.13


def test_conditioned_frames_leave_something_to_learn():
    counts = [draws.conditioned_frames(1, sample, 4, 0.6) for sample in range(2000)]
    shares = np.bincount(counts, minlength=4) / len(counts)
    np.testing.assert_allclose(shares, [0.4, 0.2, 0.2, 0.2], atol=0.04)
    assert {draws.conditioned_frames(1, sample, 1, 1.0) for sample in range(50)} == {0}
    assert {draws.conditioned_frames(1, sample, 4, 0.0) for sample in range(50)} == {0}


def test_purposes_have_streams_of_their_own():
    # Both compare their first uniform number with 0.5: from one stream they would always agree.
    dropped = [draws.drop(0, sample, 0.5) for sample in range(1000)]
    conditioned = [draws.conditioned_frames(0, sample, 2, 0.5) == 1 for sample in range(1000)]
    assert 0.44 < np.equal(dropped, conditioned).mean() < 0.56
    firsts = [draws._generator(purpose, 0).standard_normal() for purpose in draws._Purpose]
    assert len(set(firsts)) == len(draws._Purpose)


@given(size=st.integers(1, 40), epoch=st.integers(0, 1000), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_visits_each_clip_once(size, epoch, seed):
    order = draws.SampleOrder(size, seed)
    assert sorted(order[epoch * size + place] for place in range(size)) == list(range(size))


def test_orders_differ_over_epochs_seeds_and_streams_and_depend_on_nothing_else():
    streams = {(seed, stream): draws.SampleOrder(20, seed, stream) for seed in range(3) for stream in range(2)}

    def order(epoch, seed, stream):
        return tuple(streams[seed, stream][epoch * 20 + place] for place in range(20))

    orders = {(epoch, *key): order(epoch, *key) for epoch in range(3) for key in streams}
    assert len(set(orders.values())) == 18
    assert tuple(range(20)) not in orders.values()
    assert all(order(*key) == expected for key, expected in reversed(orders.items()))


def test_values_do_not_change_between_releases():
    # A run that is resumed with a newer release must see the same samples and noise.
    torch.testing.assert_close(draws.noise(7, 3, range(2, 3), (3,)), torch.tensor([[-0.5464225, 0.7970281, 0.3362361]]))
    assert draws.timestep(7, 3) == pytest.approx(0.4087596301542337)
    assert [draws.SampleOrder(5, 7)[position] for position in range(5, 10)] == [4, 0, 2, 3, 1]
    assert [draws.SampleOrder(5, 7, stream=1)[position] for position in range(5, 10)] == [1, 0, 3, 4, 2]
    assert draws.batch_order(5, 7, 1).tolist() == [1, 4, 0, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draws.timestep(-1, 0), "seed=-1"),
        (lambda: draws.timestep(0, 2**64), f"sample={2**64}"),
        (lambda: draws.noise(0, 0, range(-1, 1), (2,)), "frame=-1"),
        (lambda: draws.drop(0, 0, 1.5), "probability=1.5"),
        (lambda: draws.conditioned_frames(0, 0, 4, -0.1), "probability=-0.1"),
        (lambda: draws.SampleOrder(4, 0)[-1], "position=-1"),
        (lambda: draws.SampleOrder(0, 0), "size=0"),
        (lambda: draws.shift_timestep(0.5, 0, 1), "tokens=0"),
        (lambda: draws.shift_timestep(0.5, 1, 0), "base_tokens=0"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
