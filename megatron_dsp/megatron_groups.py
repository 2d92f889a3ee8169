"""The process groups that megatron-core has made, by the axes of a mesh. Imports nothing of Megatron."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_dsp.errors import UsageError

# Their names in a ProcessGroupCollection. The first four are its axes, the others are made where it has not got them.
_NAMES = {
    "tp": ("tensor",),
    "cp": ("sequence",),
    "dp": ("data",),
    "pp": ("pipe",),
    "dp_cp": ("data", "sequence"),
    "tp_dp_cp": ("data", "sequence", "tensor"),
    "mp": ("pipe", "tensor"),
}


def groups_of(source: Any) -> dict[tuple[str, ...], dist.ProcessGroup]:
    """This rank's groups in ``megatron.core.parallel_state`` or a ``ProcessGroupCollection``; the four axes at least.

    Errors: UsageError where it has no groups of the four axes yet, or has experts on several ranks.
    """
    named: dict[str, dist.ProcessGroup | None]
    if hasattr(source, "get_context_parallel_group"):
        named = _of_parallel_state(source)
    else:
        named = {name: getattr(source, name, None) for name in (*_NAMES, "ep")}
    missing = [name for name in ("tp", "cp", "dp", "pp") if named[name] is None]
    if missing:
        raise UsageError(
            f"{source!r} has no process group {', '.join(missing)}; Mesh.from_megatron takes megatron.core.parallel_state, or "
            "a ProcessGroupCollection with tp, cp, dp and pp (for a Megatron without context parallelism make a dsp.Mesh)"
        )
    experts = named.pop("ep")
    if experts is not None and experts.size() > 1:
        raise UsageError(
            f"expert parallel size {experts.size()}: a mesh averages gradients over data x sequence, whose ranks would hold "
            "different experts; use expert_model_parallel_size=1"
        )
    return {_NAMES[name]: group for name, group in named.items() if group is not None}


def _of_parallel_state(state: Any) -> dict[str, dist.ProcessGroup | None]:
    if not state.model_parallel_is_initialized():
        raise UsageError(f"{state.__name__} has no groups yet; call its initialize_model_parallel before Mesh.from_megatron")
    return {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "dp_cp": state.get_data_parallel_group(with_context_parallel=True),
        "tp_dp_cp": state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        "mp": state.get_model_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
    }
