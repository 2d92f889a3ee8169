"""From a ds_config to the current mesh, with the transport that its sequence group's switches take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dsp import config as configs
from megatron_dsp import mesh as meshes
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.reshard.agreement import Agreement
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.stages.measured_overlap import MeasuredOverlap
from megatron_dsp.reshard.stages.overlap import FixedOverlap, Overlap, set_overlap
from megatron_dsp.reshard.transport.mpi_transport import MpiTransport
from megatron_dsp.reshard.transport.torch_transport import TorchTransport


def initialize(config: str | Path | dict[str, Any] | configs.Config) -> Mesh:
    """Make the mesh that a ds_config asks for, and make it current: its sequence group is the default of ``dsp.switch`` etc.

    Finds rank and world from the launcher and starts torch.distributed if nobody has. Collective: every rank calls it.
    A second call with the same degrees returns the same mesh; with others it is a UsageError. A transport that is not there
    is a UsageError too, which says what is missing.
    """
    settings = configs.load(config)
    mesh = meshes.current()
    if mesh is None:
        mesh = Mesh(**settings.degrees)
        meshes.set_current(mesh)
    elif any(mesh.size(axis) != degree for axis, degree in settings.degrees.items()):
        raise UsageError(
            f"dsp.initialize was called before with other degrees: it made {mesh}, and now gets {settings.degrees}"
        )
    _set_transport(mesh, settings.sequence_parallel.transport)
    group = mesh.group("sequence")
    check = settings.sequence_parallel.check_collectives
    for checked in (group, mesh.group("tensor")):
        every = Agreement.SAMPLED if check == "sampled" else 1
        exchange_of(checked).agreement = Agreement(checked, every) if check and checked.size() > 1 else None
    section = settings.sequence_parallel.overlap
    set_overlap(group, _overlap(mesh, section), stream_priority=section.stream_priority)
    return mesh


def _overlap(mesh: Mesh, section: configs.OverlapSection) -> Overlap | None:
    if section.enabled is False or section.chunks == 1:
        return None
    if section.chunks != "auto":
        return FixedOverlap(section.chunks)
    if mesh.size("pipe") > 1:
        return None  # between a micro-batch's forward and backward others run: a pass cannot be timed
    # Whether data ranks call modules together, who trains the model knows: `deepspeed_initialize`, or the user.
    return MeasuredOverlap([mesh.group("sequence"), mesh.group("tensor")], lockstep=mesh.size("data") > 1)


def _set_transport(mesh: Mesh, wanted: str) -> None:
    group = mesh.group("sequence")
    exchange = exchange_of(group)
    name, exchange.transport_reason = _best_transport(mesh) if wanted == "auto" else (wanted, "the config asks for it")
    if exchange.transport.name != name:
        exchange.transport = MpiTransport(group) if name == "mpi" else TorchTransport(group)


def _best_transport(mesh: Mesh) -> tuple[str, str]:
    """The name of the transport that "auto" means here, and why; the same on every rank."""
    launcher = mesh.process.launcher
    if mesh.size("sequence") == 1:
        return "torch", "a sequence group of one rank moves nothing"
    if mesh.device.type != "cpu":
        return "torch", f"tensors are on {mesh.device.type}"
    if launcher != "mpirun":
        return "torch", f"tensors are on the CPU, but mpirun did not start this job ({launcher})"
    return "mpi", "tensors are on the CPU, and mpirun started this job"
