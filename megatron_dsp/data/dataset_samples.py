"""Any map-style dataset of torch as a source of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from megatron_dsp.data.data_error import DataError
from megatron_dsp.data.samples import Shape, padded_conditioning


class DatasetSamples:
    """The items of a dataset, mappings of ``latent`` [T, C, height, width], ``text`` [l, D] and ``mask`` [l], as samples.

    ``text`` may be missing, and so may ``mask``: all tokens are then there. Items must be functions of their index: the ranks
    of a sequence group each read the same one, so what is drawn at random inside a dataset differs between them.

    A rank reads its own frames alone if the dataset has a method ``read(index, start, stop)``, and the whole latent with the
    item otherwise. Likewise ``shape(index)`` gives (T, C, height, width), and ``conditioning(index)`` the text and its mask.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        shapes: (T, C, height, width) of each item, where the dataset has no ``shape``.
        conditioning_shape: (L, D), where L is the length of the longest text.

    Without both, the shapes and (L, D), every item is read once here, which takes long for a large dataset.
    """

    def __init__(
        self,
        dataset: Dataset[Mapping[str, Any]],
        *,
        shapes: Sequence[Sequence[int]] | None = None,
        conditioning_shape: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{type(dataset).__name__} has no items to take by index, which resuming and reading in any order need: give a "
                "dataset with __getitem__ and __len__, or write its samples to shards once (docs/data.md)"
            )
        self._dataset: Any = dataset
        self._last: tuple[int, Mapping[str, Any]] | None = None
        count = len(dataset)
        if count == 0:
            raise DataError(f"{type(dataset).__name__} is empty: give a dataset of at least one item")
        shape, self._read, self._conditioning = (_method_or_none(dataset, name) for name in ("shape", "read", "conditioning"))
        if shapes is None and shape is not None:
            shapes = [shape(index) for index in range(count)]
        if shapes is None or conditioning_shape is None:
            shapes, conditioning_shape = self._read_sizes(count, shapes, conditioning_shape)
        if len(shapes) != count:
            raise DataError(f"shapes= has {len(shapes)} entries for {count} items: give (T, C, height, width) of each item")
        self._shapes = [Shape(*shape) for shape in shapes]
        first = self._shapes[0]
        for index, size in enumerate(self._shapes):
            if size.channels != first.channels or min(size) < 1:
                raise DataError(
                    f"item {index} has shape {size}, and item 0 {first}: all must have equally many channels, in the order "
                    "(T, C, height, width), and no dim may be empty"
                )
        self.conditioning_tokens, self.conditioning_width = max(1, conditioning_shape[0]), conditioning_shape[1]

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, index: int) -> Shape:
        """The size of an item's latent ``[T, C, height, width]``."""
        return self._shapes[index]

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Frames ``start`` to ``stop`` of an item's latent ``[stop - start, C, height, width]``.

        Raises ``DataError`` when the dataset gives another shape than it said.
        """
        shape = self._shapes[index]
        if not 0 <= start <= stop <= shape.frames:
            raise ValueError(f"frames {start} to {stop} are not in item {index}, which has frames 0 to {shape.frames}")
        if self._read is not None:
            frames = torch.as_tensor(self._read(index, start, stop))
            return self._check_frames(index, frames, Shape(stop - start, *shape[1:]))
        return self._check_frames(index, self._latent(index), shape)[start:stop]

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The text of an item, float32 ``[L, D]``, and which tokens are there, bool ``[L]``."""
        text, mask = self._text(index)
        tokens, width = self.conditioning_tokens, self.conditioning_width
        if text is None:
            text, mask = torch.empty(0, width), torch.empty(0, dtype=torch.bool)
        if text.dim() != 2 or len(text) > tokens or text.shape[1] != width or mask.shape != text.shape[:1]:
            raise DataError(
                f"item {index} has a text {list(text.shape)} and a mask {list(mask.shape)}: they must be [l, {width}] and [l] "
                f"with l <= {tokens}, by conditioning_shape=({tokens}, {width})"
            )
        return padded_conditioning(text, mask.bool(), tokens, width)

    def _check_frames(self, index: int, frames: torch.Tensor, shape: Shape) -> torch.Tensor:
        if frames.shape != shape or not frames.is_floating_point():
            raise DataError(
                f"item {index} gave {frames.dtype} {list(frames.shape)}, not floating point {shape} as its shape says: give "
                "each item's true shape, and the same item at every call"
            )
        return frames

    def _item(self, index: int) -> Mapping[str, Any]:
        # A batch asks twice for each item, once for its frames and once for its text.
        last = self._last
        if last is None or last[0] != index:
            item = self._dataset[index]
            if not isinstance(item, Mapping):
                raise DataError(f"item {index} is a {type(item).__name__}: it must be a mapping of latent, text and mask")
            self._last = last = (index, item)
        return last[1]

    def _latent(self, index: int) -> torch.Tensor:
        item = self._item(index)
        if "latent" not in item:
            raise DataError(f"item {index} has no 'latent', only {sorted(item)}: give latent [T, C, height, width]")
        return torch.as_tensor(item["latent"])

    def _text(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        if self._conditioning is not None:
            text, mask = self._conditioning(index)
        else:
            item = self._item(index)
            text, mask = item.get("text"), item.get("mask")
        if text is None:
            return None, torch.empty(0, dtype=torch.bool)
        text = torch.as_tensor(text)
        return text, torch.ones(text.shape[:1], dtype=torch.bool) if mask is None else torch.as_tensor(mask)

    def _read_sizes(
        self, count: int, shapes: Sequence[Sequence[int]] | None, conditioning_shape: tuple[int, int] | None
    ) -> tuple[Sequence[Sequence[int]], tuple[int, int]]:
        """The shapes of the items and (L, D); what is None is found by reading every item."""
        latents: list[Sequence[int]] = []
        texts: list[tuple[int, ...]] = []
        for index in range(count):
            if shapes is None:
                latents.append(self._latent(index).shape)
                if len(latents[-1]) != 4:
                    raise DataError(f"item {index} has a latent {list(latents[-1])}: give [T, C, height, width]")
            text, _ = self._text(index) if conditioning_shape is None else (None, None)
            if text is not None:
                texts.append(tuple(text.shape))
                if len(texts[-1]) != 2 or texts[-1][1] != texts[0][1]:
                    raise DataError(f"item {index} has a text {list(texts[-1])}: give [l, D] with the same D in all items")
        if conditioning_shape is None:
            conditioning_shape = (max(length for length, _ in texts), texts[0][1]) if texts else (1, 1)
        return latents if shapes is None else shapes, conditioning_shape


def _method_or_none(dataset: object, name: str) -> Callable[..., Any] | None:
    # Some datasets have attributes of these names, such as the shape of a table.
    method = getattr(dataset, name, None)
    return method if callable(method) else None
