"""Any dataset of torch as a source of samples: what it is asked for, what it may leave out, and what is refused."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from megatron_dsp import shard_range
from megatron_dsp.data import DataError, DatasetSamples, VideoBatches


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Items(Dataset):
    """A dataset as most are; it counts what it is asked for."""

    def __init__(self, *items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.items[index]


ITEMS = (
    {"latent": random(5, 4, 2, 3), "text": random(3, 8), "mask": torch.tensor([1, 0, 1])},
    {"latent": random(1, 4, 6, 6, seed=1).half(), "text": random(6, 8, seed=2).bfloat16()},
    {"latent": random(2, 4, 2, 3, seed=3).numpy(), "caption": "what else is there does no harm"},
)
SHAPES = [(5, 4, 2, 3), (1, 4, 6, 6), (2, 4, 2, 3)]


@pytest.mark.parametrize(
    "given", [{}, {"shapes": SHAPES}, {"conditioning_shape": (6, 8)}, {"shapes": SHAPES, "conditioning_shape": (6, 8)}]
)
def test_items_are_samples(given):
    dataset = Items(*ITEMS)
    samples = DatasetSamples(dataset, **given)
    assert dataset.asked == ([] if len(given) == 2 else [0, 1, 2]), "every item is read at most once"
    assert [samples.shape(index) for index in range(len(samples))] == SHAPES
    assert (samples.conditioning_tokens, samples.conditioning_width) == (6, 8)
    for index, item in enumerate(ITEMS):
        frames = SHAPES[index][0]
        for start, stop in ((0, frames), (frames - 1, frames), (1, 1)):
            assert torch.equal(samples.read(index, start, stop), torch.as_tensor(item["latent"])[start:stop])
    text, mask = samples.conditioning(0)
    assert mask.tolist() == [True, False, True, False, False, False]
    assert torch.equal(text[:3], ITEMS[0]["text"] * mask[:3, None])
    text, mask = samples.conditioning(1)
    assert mask.all()
    assert torch.equal(text, ITEMS[1]["text"].float())
    text, mask = samples.conditioning(2)
    assert text.shape == (6, 8)
    assert not text.any()
    assert not mask.any()


def test_without_any_text_there_is_one_missing_token():
    samples = DatasetSamples(Items(ITEMS[2]))
    text, mask = samples.conditioning(0)
    assert text.tolist() == [[0]]
    assert mask.tolist() == [False]


def batches_of(samples):
    return VideoBatches(
        samples=samples, global_batch_size=2, seed=0, patch=(1, 1, 1), drop_probability=0.0, clean_frame_probability=0.0
    )


def test_a_batch_takes_each_item_once():
    dataset = Items(*ITEMS)
    batches = batches_of(DatasetSamples(dataset, shapes=SHAPES, conditioning_shape=(6, 8)))
    batch = batches.batch([0, 1], range(1))
    assert batch.video.dtype == torch.float32
    assert len(dataset.asked) <= 2


class Partial(Items):
    """A dataset that can read some frames of an item."""

    def shape(self, index):
        return SHAPES[index]

    def read(self, index, start, stop):
        self.asked.append((index, start, stop))
        return torch.as_tensor(self.items[index]["latent"])[start:stop]

    def conditioning(self, index):
        return self.items[index].get("text"), self.items[index].get("mask")


def test_a_dataset_that_reads_frames_is_asked_for_a_ranks_own():
    dataset, plain = Partial(*ITEMS), batches_of(DatasetSamples(Items(*ITEMS)))
    batches = batches_of(DatasetSamples(dataset))
    assert dataset.asked == [], "not even the lengths of texts need an item"
    for step in range(3):
        positions = [2 * step, 2 * step + 1]
        shape = batches.shape(positions)
        for rank in range(3):
            dataset.asked.clear()
            own = range(*shard_range(shape.frames, 3, rank))
            part, other = batches.batch(positions, own), plain.batch(positions, own)
            assert torch.equal(part.video, other.video)
            assert torch.equal(part.conditioning, other.conditioning)
            index = SHAPES.index(shape)
            assert dataset.asked == ([(index, own.start, own.stop)] * 2 if own else [])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ITEMS)


class Table(Items):
    """Some datasets have an attribute of this name, such as those of the library datasets."""

    shape = (3, 2)


def test_an_attribute_that_is_no_method_is_left_alone():
    assert DatasetSamples(Table(*ITEMS)).shape(1) == SHAPES[1]


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (Stream(), {}, "Stream has no items to take by index.* write its samples to shards once"),
        (Items(), {}, "Items is empty"),
        (Items(ITEMS), {}, "item 0 is a tuple: it must be a mapping"),
        (Items({"pixels": 1}), {}, r"item 0 has no 'latent', only \['pixels'\]"),
        (Items({"latent": random(4, 2, 3)}), {}, r"item 0 has a latent \[4, 2, 3\]"),
        (Items(*ITEMS, {"latent": random(5, 3, 2, 3)}), {}, r"item 3 has shape \[5, 3, 2, 3\], and item 0 \[5, 4, 2, 3\]"),
        (Items({"latent": random(0, 4, 2, 3)}), {}, "no dim may be empty"),
        (Items(ITEMS[0], ITEMS[0] | {"text": random(3, 9)}), {}, r"item 1 has a text \[3, 9\]: give \[l, D\]"),
        (Items(*ITEMS), {"shapes": SHAPES[:2]}, "shapes= has 2 entries for 3 items"),
    ],
)
def test_datasets_that_cannot_be_used_are_refused(dataset, arguments, message):
    with pytest.raises(DataError, match=message):
        DatasetSamples(dataset, **arguments)


def test_items_that_are_not_what_was_said_are_named():
    samples = DatasetSamples(Items(*ITEMS), shapes=[(6, 4, 2, 3), *SHAPES[1:]], conditioning_shape=(2, 8))
    with pytest.raises(DataError, match=re.escape("item 0 gave torch.float32 [5, 4, 2, 3], not floating point [6, 4, 2, 3]")):
        samples.read(0, 0, 2)
    with pytest.raises(
        DataError, match=re.escape("item 0 has a text [3, 8] and a mask [3]: they must be [l, 8] and [l] with l <= 2")
    ):
        samples.conditioning(0)
    with pytest.raises(ValueError, match="frames 1 to 3 are not in item 2"):
        samples.read(2, 1, 3)
    pixels = {"latent": np.zeros((1, 4, 2, 2), dtype=np.uint8)}
    with pytest.raises(DataError, match=r"item 0 gave torch.uint8"):
        DatasetSamples(Items(pixels)).read(0, 0, 1)
