"""DeepSpeed driven by a mesh: one gradient rule in every ZeRO stage, and batch sizes that are true on both sides.

To DeepSpeed the data axis is data x sequence (``mesh.mpu``), so that it averages gradients over both. But the ranks of a
sequence group share their samples, so what a user writes and reads as batch size counts them once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from megatron_dsp import config as configs
from megatron_dsp import launch
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import DeepSpeedView, Mesh
from megatron_dsp.models.video_dit import Block
from megatron_dsp.reshard import MeasuredOverlap, overlap_of
from megatron_dsp.training.compilation import compile_stages
from megatron_dsp.training.graph_capture import capture
from megatron_dsp.training.sampler import sampler


def deepspeed_initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Dataset | None = None,
    lr_scheduler: Any = None,
    *,
    mesh: Mesh,
    config: str | Path | dict[str, Any] | configs.Config | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` on a mesh; the same arguments and the same four results: engine, optimizer, loader, scheduler.

    Gradients are averaged over data x sequence in every ZeRO stage. Batch sizes in ``config``, and those that the engine
    reports (``train_batch_size()``, ``global_samples``, samples a second), count samples once. The loader of
    ``training_data`` gives the ranks of one sequence group the same samples. ``args.deepspeed_config`` serves where
    ``config`` is not given; a client optimizer needs ``"zero_allow_untested_optimizer": true``, as always in DeepSpeed.
    A ``PipelineModule`` over `megatron_dsp.pipeline.topology` makes a pipeline engine, whose data comes by ``train_batch``.

    Errors: UsageError, on every rank, where the config does not fit the mesh or asks for what is not built.
    """
    # Its import takes seconds, which those who train with DDP or FSDP need not spend.
    import deepspeed
    from deepspeed.pipe import PipelineModule

    if model is None:
        raise UsageError("deepspeed_initialize needs a model")
    given = [source for source in (config, getattr(args, "deepspeed_config", None)) if source is not None]
    if len(given) != 1:
        raise UsageError("give the ds_config once: as config=, or as args.deepspeed_config")
    settings = configs.load(given[0])
    _check_degrees(settings, mesh)
    _, micro, steps = settings.batch_sizes.complete(mesh.size("data"))
    ds_config = {key: value for key, value in settings.deepspeed.items() if key not in configs.BatchSizes.model_fields} | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    pipelined = isinstance(model, PipelineModule)
    _check_pipeline(model, settings, mesh)
    if settings.sequence_parallel.compile:
        compile_stages(_blocks(model))
    if settings.sequence_parallel.cuda_graphs:
        _check_cuda_graphs(settings, mesh)
    if pipelined:
        # On by default, these send the first of several tensors in parts, and take the rest to need no gradient.
        ds_config["pipeline"] = {**ds_config.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False}

    launch.start_deepspeed(mesh.device.type)
    engine, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        mpu=None if pipelined else DeepSpeedView(mesh, true_batch_sizes=True),  # a pipeline brings its own
        dist_init_required=False,
        config=ds_config,
    )
    _report_true_batch_sizes(engine, mesh.size("data"))
    if settings.sequence_parallel.cuda_graphs:
        capture(engine.module)
    overlap = overlap_of(mesh.group("sequence"))
    if isinstance(overlap, MeasuredOverlap) and engine.zero_optimization_stage() < 3:
        overlap.lockstep = False  # weights are not gathered module by module
    loader = None
    if training_data is not None:
        loader = engine.deepspeed_io(
            training_data,
            data_sampler=sampler(training_data, mesh),
            collate_fn=collate_fn,
            pin_memory=mesh.device.type == "cuda",
        )
        engine.training_dataloader = loader
    return engine, optimizer, loader, lr_scheduler


def _check_degrees(settings: configs.Config, mesh: Mesh) -> None:
    for axis, degree in settings.degrees.items():
        if degree != mesh.size(axis):
            raise UsageError(f"the config gives {axis} degree {degree}, but this mesh has {mesh.size(axis)}; make them agree")
    zero = settings.deepspeed.get("zero_optimization", {})
    for key, neutral in (("mics_shard_size", -1), ("zero_hpz_partition_size", 1)):
        if zero.get(key, neutral) not in (neutral, 0):
            raise UsageError(
                f"zero_optimization.{key}={zero[key]} makes groups of its own that do not know the sequence axis; remove it"
            )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What ``"compile": true`` compiles of ``model``. Errors: UsageError where that is not known."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise UsageError(
            f"sequence_parallel.compile=true: which modules of a {type(model).__name__} are stages is not known; remove the "
            "key, and call dsp.compile_stages with them"
        )
    return blocks


def _check_cuda_graphs(settings: configs.Config, mesh: Mesh) -> None:
    """Refuse now what `capture` would, and pipelines. Errors: UsageError."""
    moving = "it gathers and frees weights around each module, at addresses that change, and a graph has those of its capture"
    cases = [
        (mesh.device.type != "cuda", f"tensors on {mesh.device.type}", "CUDA graphs need a GPU"),
        (
            mesh.size("pipe") > 1,
            f"pipe={mesh.size('pipe')}",
            "several forwards come before a backward, and a graph has memory for one",
        ),
        (settings.deepspeed.get("zero_optimization", {}).get("stage", 0) > 2, "ZeRO stage 3", moving),
        (
            settings.sequence_parallel.check_collectives,
            "check_collectives",
            "ranks compare on the host, which replays leave out",
        ),
    ]
    for found, what, reason in cases:
        if found:
            raise UsageError(f"sequence_parallel.cuda_graphs=true with {what}: {reason}; change one of the two")


def _check_pipeline(model: nn.Module, settings: configs.Config, mesh: Mesh) -> None:
    """Refuse a model that does not fit the pipe axis, and what DeepSpeed's pipelines cannot do, or do wrongly."""
    from deepspeed.pipe import PipelineModule

    degree = mesh.size("pipe")
    if not isinstance(model, PipelineModule):
        if degree > 1:
            raise UsageError(
                f"pipe={degree} needs a model that is a deepspeed.pipe.PipelineModule over pipeline.topology(mesh)"
            )
        return
    expected = {"pipe": degree, "data": mesh.group("data", "sequence").size(), "model": mesh.size("tensor")}
    given = {axis: model.topology().get_dim(axis) for axis in model.topology().get_axis_names()}
    if given != expected:
        raise UsageError(
            f"the pipeline's topology {given} is not this mesh's {expected} (its data axis is data x sequence); make it with "
            "megatron_dsp.pipeline.topology(mesh)"
        )
    check_pipeline_config(settings)
    for key in ("pipe_partitioned", "grad_partitioned"):
        if settings.deepspeed.get("pipeline", {}).get(key):
            raise UsageError(f"pipeline.{key}=true sends no gradients of side inputs; remove it")


def check_pipeline_config(settings: configs.Config) -> None:
    """Refuse what DeepSpeed's pipelines do not do, or do wrongly (docs/parallelism.md). Errors: UsageError."""
    from deepspeed.runtime.config import get_gradient_clipping

    stage = settings.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if stage > 1:
        raise UsageError(
            f"zero_optimization.stage={stage} with a pipeline: DeepSpeed has no gradient shards there; use stage 0 or 1"
        )
    clipping = get_gradient_clipping(settings.deepspeed)  # where it is not given, DeepSpeed has a default above 0
    if stage == 0 and settings.mesh.pipe > 1 and clipping > 0:
        raise UsageError(
            f"gradient_clipping={clipping} with a pipeline in ZeRO stage 0: DeepSpeed leaves the later stages out of the norm; "
            'give "gradient_clipping": 0, or use stage 1'
        )


def _report_true_batch_sizes(engine: Any, data: int) -> None:
    """Let the engine count samples over ``data`` ranks, as the user does, instead of data x sequence."""

    def set_train_batch_size(engine: Any, train_batch_size: int) -> None:
        micro = engine.train_micro_batch_size_per_gpu()
        if train_batch_size % (micro * data):
            raise UsageError(f"train_batch_size={train_batch_size} must be a multiple of micro batch {micro} x data {data}")
        engine._config.train_batch_size = train_batch_size
        engine._config.gradient_accumulation_steps = train_batch_size // (micro * data)
        engine.tput_timer.batch_size = train_batch_size
        if hasattr(engine, "micro_batches"):  # of a pipeline
            engine.micro_batches = engine.gradient_accumulation_steps()
            engine.batch_timer.batch_size = train_batch_size

    def set_train_micro_batch_size(engine: Any, micro_batch_size: int) -> None:
        engine._config.train_micro_batch_size_per_gpu = micro_batch_size
        if hasattr(engine, "micro_batch_size"):
            engine.micro_batch_size = micro_batch_size
        set_train_batch_size(engine, micro_batch_size * engine.gradient_accumulation_steps() * data)

    engine.set_train_batch_size = MethodType(set_train_batch_size, engine)
    engine.set_train_micro_batch_size = MethodType(set_train_micro_batch_size, engine)
    engine.set_train_micro_batch_size(engine.train_micro_batch_size_per_gpu())
