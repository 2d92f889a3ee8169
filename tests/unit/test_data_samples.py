"""Validation samples are held out of each bucket."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.data import DataError, Shape, hold_out
from megatron_dsp.data.samples import padded_conditioning

SHAPES = [Shape(1, 4, 2, 2), Shape(5, 4, 2, 2), Shape(5, 4, 3, 2)]


class Numbers:
    """Samples that are their own index."""

    conditioning_tokens, conditioning_width = 3, 8

    def __init__(self, shapes):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def shape(self, index):
        return self.shapes[index]

    def read(self, index, start, stop):
        return index, start, stop

    def conditioning(self, index):
        return index, "mask"


@given(shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=60), fraction=st.floats(0.01, 0.99))
def test_a_part_of_each_bucket_is_held_out_and_something_remains(shapes, fraction):
    samples = Numbers(shapes)
    sizes = Counter(shapes)
    if max(sizes.values()) == 1:
        with pytest.raises(DataError, match="only one of its shape"):
            hold_out(samples, fraction)
        return
    training, validation = hold_out(samples, fraction)
    assert training.indices == sorted(training.indices)
    assert sorted(training.indices + validation.indices) == list(range(len(shapes)))
    for shape, size in sizes.items():
        kept, held = ([index for index in part.indices if shapes[index] == shape] for part in (training, validation))
        assert len(held) == min(size - 1, math.ceil(fraction * size))
        assert max(kept) < min(held, default=len(shapes))
    again = hold_out(samples, fraction)
    assert (again[0].indices, again[1].indices) == (training.indices, validation.indices)


def test_a_subset_passes_on_what_it_is_asked():
    training, validation = hold_out(Numbers([SHAPES[0]] * 3 + [SHAPES[1]] * 4), 0.3)
    assert (training.indices, validation.indices) == ([0, 1, 3, 4], [2, 5, 6])
    assert (len(validation), validation.shape(0), validation.shape(1)) == (3, SHAPES[0], SHAPES[1])
    assert validation.read(1, 2, 4) == (5, 2, 4)
    assert validation.conditioning(2) == (6, "mask")
    assert (validation.conditioning_tokens, validation.conditioning_width) == (3, 8)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_the_fraction_is_checked(fraction):
    with pytest.raises(DataError, match=f"fraction={fraction}"):
        hold_out(Numbers(SHAPES * 2), fraction)


def test_what_a_mask_leaves_out_becomes_zero():
    text = torch.tensor([[1.0, 2.0], [float("nan"), 3.0], [4.0, 5.0]], dtype=torch.bfloat16)
    tokens, mask = padded_conditioning(text, torch.tensor([True, False, True]), 4, 2)
    assert tokens.tolist() == [[1, 2], [0, 0], [4, 5], [0, 0]]
    assert tokens.dtype == torch.float32
    assert mask.tolist() == [True, False, True, False]
