"""Where DeepSpeed keeps a rank's fp32 weights, by the names of the model's parameters (DeepSpeed 0.19.8).

| ZeRO | precision | optimizer | this rank's fp32 weights |
|---|---|---|---|
| 0 | fp32 | the user's | the parameters themselves, whole |
| 0 | fp16, bf16 | FP16_Optimizer (fused Adam), FP16_UnfusedOptimizer | fp32 copies of all parameters, whole |
| 0 with a pipeline | bf16 | BF16_Optimizer | a range of the flattened parameters |
| 1, 2 | any | DeepSpeedZeroOptimizer, BF16_Optimizer | the same |
| 3 | any | DeepSpeedZeroOptimizer_Stage3 | a part of each parameter (``ds_tensor``) |

The optimizer's memory is a few long tensors. What is averaged or exchanged with it is a list of tensors like these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsp.checkpoint import tensor_file
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh


class Fragment(NamedTuple):
    """What this rank has of a parameter, flattened.

    Attributes:
        start: of the parameter's elements, the first that this rank has.
        size: how many it has.
        source: which of the optimizer's tensors they are in; None where the optimizer does not train the parameter.
        offset: where they begin in it.
    """

    start: int
    size: int
    source: int | None
    offset: int = 0


class FlatReader(Protocol):
    """Where `MasterWeights.load` finds parameters, by the names of the module."""

    def read_flat(self, name: str, start: int, size: int) -> Tensor:
        """``size`` elements of a flattened parameter from ``start`` on."""


class MasterWeights:
    """The fp32 weights of a DeepSpeed engine as this rank has them: whole, or sharded over data x sequence.

    Makes no copy. DeepSpeed may move its memory, as when it offloads, so nothing here holds on to it between calls.

    Attributes:
        fragments: by the names of the module's parameters; in a pipeline those of this rank's layers, whose numbers are the
            model's at any degree.

    Errors: UsageError where the engine keeps them on NVMe, or has no optimizer (`reason_against`).
    """

    def __init__(self, engine: Any, mesh: Mesh):
        reason = reason_against(engine)
        if reason is not None:
            raise UsageError(reason)
        self._engine, self._device, self._group = engine, mesh.device, mesh.group("data", "sequence")
        self._parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._buffers = persistent_buffers(engine.module)
        self.fragments = self._find_fragments()

    def tensors(self) -> list[Tensor]:
        """The optimizer's memory for this rank's weights, with its padding: no copies."""
        return [tensor.detach() for tensor in self.state_keys()]

    def state_keys(self) -> list[Tensor]:
        """The same as the objects by which the optimizer's own state is found."""
        optimizer = self._engine.optimizer
        for name in _FLAT_LISTS:
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        if hasattr(optimizer, "fp32_groups"):  # of FP16_UnfusedOptimizer
            return list(chain.from_iterable(optimizer.fp32_groups))
        return [p for name, p in self._parameters.items() if self.fragments[name].source is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Let the model compute with what the optimizer's memory holds now, as after an optimizer step.

        Collective over data x sequence, but where every rank has the whole.
        """
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            optimizer.checkpoint_event_prologue()  # no parameter stays gathered
            for index in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()  # but the small ones, which are gathered anew
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp16_groups"):
            tensors = self.tensors()
            for name, parameter in self._parameters.items():
                if self.fragments[name].source is not None:
                    parameter.copy_(self.view_fragment(name, tensors).view_as(parameter))

    def view_fragment(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's fragment of a parameter, flat, from ``tensors``, which are the optimizer's or like them.

        It is a view where they are contiguous.
        """
        _, size, source, offset = self.fragments[name]
        if source is not None:
            return tensors[source].reshape(-1)[offset : offset + size]
        parameter = self._parameters[name]
        return getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)[:size]

    def gather_parameter(self, name: str, tensors: Sequence[Tensor]) -> Tensor | None:
        """A whole parameter in fp32 on the first rank of data x sequence, None on the others; collective over that group."""
        fragment, parameter, first = self.fragments[name], self._parameters[name], self._group.rank() == 0
        own, shape = self.view_fragment(name, tensors).to(self._device, torch.float32), _shape(parameter)
        if not (hasattr(parameter, "ds_id") or (fragment.source is not None and _flat_weights(self._engine.optimizer))):
            return own.view(shape) if first else None
        whole = own.new_zeros(math.prod(shape))
        whole[fragment.start : fragment.start + fragment.size] = own
        # As integers: a sum with zeros keeps every bit of them.
        dist.reduce(whole.view(torch.int32), group=self._group, group_dst=0)
        return whole.view(shape) if first else None

    def save(self, path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
        """Write all parameters, whole and in fp32, into a safetensors file; ``tensors`` are like the optimizer's.

        Parameters that are not trained, and persistent buffers in their own dtypes, are written as the model has them. The
        first rank of data x sequence writes, and holds one whole parameter at a time. Collective over that group.
        """
        entries = {name: (torch.float32, _shape(parameter)) for name, parameter in self._parameters.items()}
        entries |= {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in self._buffers.items()}
        entries = dict(sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize))
        first = self._group.rank() == 0
        names = iter(entries)
        try:
            with tensor_file.create(path, entries, metadata) if first else nullcontext() as append:
                for name in names:
                    value = self._buffers[name] if name in self._buffers else self.gather_parameter(name, tensors)
                    if append is not None and value is not None:
                        append(value)
        except OSError:
            for name in names:  # the others of the group do not know that this file cannot be written
                if name not in self._buffers:
                    self.gather_parameter(name, tensors)
            raise

    @torch.no_grad()
    def load(self, source: FlatReader, tensors: Sequence[Tensor], *, all_of_them: bool = False) -> None:
        """Copy this rank's fragments of the trained parameters from ``source`` into ``tensors``, made like the optimizer's.

        ``all_of_them``: of the others too, into the model's own.
        """
        for name, (start, size, where, _) in self.fragments.items():
            if where is not None or all_of_them:
                self.view_fragment(name, tensors).copy_(source.read_flat(name, start, size))

    def _find_fragments(self) -> dict[str, Fragment]:
        optimizer, parameters = self._engine.optimizer, self._parameters
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return {name: self._stage3_fragment(parameter) for name, parameter in parameters.items()}
        flat = bool(_flat_weights(optimizer))
        found = _range_fragments(optimizer, self._group.rank()) if flat else _whole_fragments(optimizer, parameters.values())
        return {name: found.get(id(p), Fragment(0, p.numel(), None)) for name, p in parameters.items()}

    def _stage3_fragment(self, parameter: Any) -> Fragment:
        optimizer, part = self._engine.optimizer, parameter.partition_numel()
        start = min(part * self._group.rank(), parameter.ds_numel)
        size = min(part, parameter.ds_numel - start)  # the last parts have padding
        source, offset, _ = optimizer.grad_position.get(optimizer.get_param_id(parameter), (None, 0, 0))
        return Fragment(start, size, source, offset)


def reason_against(engine: Any) -> str | None:
    """Why the fp32 weights of an engine cannot be reached, or None."""
    if engine.optimizer is None:
        return "the DeepSpeed engine has no optimizer, and so no fp32 weights of its own; give deepspeed_initialize one"
    for key in ("offload_optimizer", "offload_param"):
        offload = getattr(engine._config.zero_config, key)
        if offload is not None and offload.device == "nvme":
            return f"zero_optimization.{key}.device=nvme keeps fp32 weights in files of DeepSpeed's own; use cpu, or no offload"
    return None


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that belong to its state, by name."""
    state = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


# Where optimizers have lists of flat tensors: ZeRO 3; ZeRO 1 and 2; BF16_Optimizer; FP16_Optimizer.
_FLAT_LISTS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
)


def _flat_weights(optimizer: Any) -> list[Tensor]:
    """Where an optimizer shards flattened parameters, the model's own weights so flattened, by group."""
    return getattr(optimizer, "bit16_groups_flat", None) or getattr(optimizer, "bf16_groups_flat", [])


def _range_fragments(optimizer: Any, rank: int) -> dict[int, Fragment]:
    """Fragments of flattened parameters, by parameters' ids.

    The order in which they are flattened is seen from where they lie: DeepSpeed's own map of it, ``_hp_mapping``, is wrong with
    "round_robin_gradients", and so is its ``safe_get_full_fp32_param`` then.
    """
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    fragments = {}
    for source, (flat, group) in enumerate(zip(_flat_weights(optimizer), groups, strict=True)):
        part = flat.numel() // optimizer.real_dp_process_group[source].size()
        for parameter in group:
            before = part * rank - (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            start, stop = max(before, 0), min(before + part, parameter.numel())
            if start < stop:
                fragments[id(parameter)] = Fragment(start, stop - start, source, start - before)
            else:
                fragments[id(parameter)] = Fragment(0, 0, source)  # other ranks have all of it
    return fragments


def _whole_fragments(optimizer: Any, parameters: Iterable[nn.Parameter]) -> dict[int, Fragment]:
    """Fragments that are whole parameters or their fp32 copies, by parameters' ids."""
    if hasattr(optimizer, "fp32_groups_flat"):
        fragments: dict[int, Fragment] = {}
        for source, group in enumerate(optimizer.fp16_groups):
            starts = accumulate((parameter.numel() for parameter in group), initial=0)
            fragments |= {id(p): Fragment(0, p.numel(), source, start) for p, start in zip(group, starts, strict=False)}
        return fragments
    if hasattr(optimizer, "fp32_groups"):
        trained: Iterable[nn.Parameter] = chain.from_iterable(optimizer.fp16_groups)
    else:
        trained = (parameter for parameter in parameters if parameter.requires_grad)
    return {id(parameter): Fragment(0, parameter.numel(), source) for source, parameter in enumerate(trained)}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
