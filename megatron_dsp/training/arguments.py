"""Megatron's flags for a training script, and how they agree with a ds_config.

A flag fills in what the ds_config leaves out. A value given in both must be the same: one source of truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from megatron_dsp import config as configs
from megatron_dsp.errors import UsageError

# flag -> where the same value stands in a ds_config
_CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "tensor_model_parallel_size": ("mesh", "tensor"),
    "pipeline_model_parallel_size": ("mesh", "pipe"),
    "dynamic_sequence_parallel_size": ("sequence_parallel", "size"),
    "micro_batch_size": ("train_micro_batch_size_per_gpu",),
    "global_batch_size": ("train_batch_size",),
    "clip_grad": ("gradient_clipping",),
    "lr": ("optimizer", "params", "lr"),
    "weight_decay": ("optimizer", "params", "weight_decay"),
    "compile": ("sequence_parallel", "compile"),
    "cuda_graphs": ("sequence_parallel", "cuda_graphs"),
}
# The optimizer and schedule of the script, used where the ds_config has no "optimizer" section of its own.
_OPTIMIZER_DEFAULTS: dict[str, float | None] = {
    "lr": 1e-4,
    "min_lr": 0.0,
    "lr_warmup_iters": 0,
    "lr_decay_iters": None,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
}
_LEAST = {
    "train_iters": 1,
    "log_interval": 1,
    "eval_interval": 1,
    "save_interval": 1,
    "keep": 1,
    "eval_iters": 0,
    "lr_warmup_iters": 0,
    "lr_decay_iters": 1,
    "seed": 0,
    "dry_run": 1,
    "micro_batch_size": 1,
    "num_samples": 1,
    "stage_timers_interval": 0,
    "peak_tflops_per_device": 0.001,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{' '.join(message.split())} (see {self.prog} --help)")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None, of arguments without a help text too."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def parser(description: str, *, trains: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that every script of this package has; a script adds its own. A wrong flag is a UsageError.

    ``trains``: whether the script trains, and so has the flags of training too.
    """
    arguments = _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)
    add = arguments.add_argument
    # The deepspeed launcher passes it; launch.py knows better.
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # Scripts of DeepSpeed's tutorials are started with it; here DeepSpeed always runs.
    add("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add("--deepspeed_config", "--deepspeed-config", type=Path, help="the ds_config: ZeRO, precision, our own sections")
    add("--seed", type=int, default=1234)

    group = arguments.add_argument_group("degrees (data fills the world)")
    group.add_argument("--tensor-model-parallel-size", type=int)
    group.add_argument("--pipeline-model-parallel-size", type=int)
    group.add_argument("--dynamic-sequence-parallel-size", type=int)
    if trains:
        _add_training(arguments)
    return arguments


def _add_training(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--dry-run",
        type=int,
        metavar="RANKS",
        help="start nothing: print the memory of a rank and the bytes that it sends in a step, for a job of so many ranks",
    )
    group = arguments.add_argument_group("parallelism")
    group.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="Megatron's: activations between tensor-parallel parts are sharded over the tensor ranks",
    )
    group.add_argument(
        "--pipeline-partition-method",
        default="parameters",
        help="DeepSpeed's partition_method: parameters, uniform or type:REGEX (of the classes of layers to balance)",
    )
    group.add_argument(
        "--recompute-granularity", choices=["full"], help="full: blocks are computed again in backward; default: kept"
    )
    # None where they are not given: the ds_config may ask for them too.
    group.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="blocks are compiled by torch.compile, for each shape anew; switches stay between them",
    )
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        default=None,
        help="forward and backward of the model are captured in CUDA graphs, for each shape that comes back",
    )

    group = arguments.add_argument_group("training")
    group.add_argument("--micro-batch-size", type=int, help="samples a data rank and micro-batch")
    group.add_argument("--global-batch-size", type=int, help="samples a step, counted once for a sequence group")
    group.add_argument("--train-iters", type=int, default=100, help="iterations of the run")
    group.add_argument("--lr", type=float, help="learning rate (default: 1e-4)")
    group.add_argument("--min-lr", type=float, help="where the cosine ends (default: 0)")
    group.add_argument("--lr-warmup-iters", type=int, help="iterations of linear warm-up (default: 0)")
    group.add_argument("--lr-decay-iters", type=int, help="iteration at which --min-lr is reached (default: --train-iters)")
    group.add_argument("--weight-decay", type=float, help="of AdamW (default: 0.01)")
    group.add_argument("--adam-beta1", type=float, help="(default: 0.9)")
    group.add_argument("--adam-beta2", type=float, help="(default: 0.999)")
    group.add_argument("--adam-eps", type=float, help="(default: 1e-8)")
    group.add_argument(
        "--clip-grad",
        type=float,
        help="largest global gradient norm; 0: no clipping (default: DeepSpeed's, which is 1.0 in 0.19)",
    )
    group.add_argument(
        "--ema-decay", type=float, help="keep an exponential moving average of the weights, e.g. 0.9999 (default: none)"
    )

    group = arguments.add_argument_group("checkpoints, validation, logging")
    group.add_argument("--save", type=Path, help="folder to save checkpoints in")
    group.add_argument("--save-interval", type=int, help="iterations between checkpoints; default: only at the end")
    group.add_argument("--keep", type=int, help="keep the newest so many checkpoints in the folder of --save; default: all")
    group.add_argument("--load", type=Path, help="folder to resume from; degrees and ZeRO stage may be others")
    group.add_argument(
        "--no-load-optim", action="store_true", help="take weights alone from --load, and start the optimizer anew"
    )
    group.add_argument(
        "--no-load-rng", action="store_true", help="start random numbers anew: at other pipe, data or sequence degrees"
    )
    group.add_argument("--eval-interval", type=int, default=1000)
    group.add_argument("--eval-iters", type=int, default=1, help="global batches of a validation; 0: none")
    group.add_argument("--log-interval", type=int, default=10)
    group.add_argument("--tensorboard-dir", type=Path, help="folder for TensorBoard; other monitors: in the ds_config")
    group.add_argument(
        "--peak-tflops-per-device",
        type=float,
        help="dense TFLOP/s that a device can reach, for MFU (default: what is known of the GPU, for bf16 and fp16)",
    )
    group.add_argument(
        "--stage-timers-interval",
        type=int,
        default=0,
        help="iterations between those whose stages are timed, forward and backward, under torch's profiler; 0: none",
    )
    group.add_argument(
        "--exposed-communication-interval",
        type=int,
        default=0,
        help="iterations between measurements of what switches add to a step, by stage; each takes some 30 steps; 0: none",
    )
    group.add_argument("--profile", action="store_true", help="write a trace of some iterations, for ui.perfetto.dev")
    group.add_argument("--profile-step-start", type=int, default=10, help="first iteration of the trace")
    group.add_argument("--profile-step-end", type=int, default=12, help="iteration before which it ends")
    group.add_argument("--profile-dir", type=Path, default=Path("profile"), help="folder of the traces, one file a rank")


def settings(arguments: argparse.Namespace) -> configs.Config:
    """The ds_config of a run: the file's, with what the flags add. Fills in the defaults of the optimizer's flags.

    Errors: UsageError for what does not agree.
    """
    raw: dict[str, Any] = configs.read(arguments.deepspeed_config) if arguments.deepspeed_config else {}
    value: Any
    for flag, path in _CONFIG_KEYS.items():
        value = getattr(arguments, flag, None)  # a script that does not train has fewer flags
        if value is None or (flag in _OPTIMIZER_DEFAULTS and "optimizer" not in raw):
            continue
        _fill_in(raw, path, value, f"--{flag.replace('_', '-')}" + ("" if value is True else f" {value}"))
    if "lr" in arguments:
        _settle_optimizer(arguments, raw)
        _settle_monitoring(arguments, raw)
    for flag, least in _LEAST.items():
        value = getattr(arguments, flag, None)
        if value is not None and value < least:
            raise UsageError(f"--{flag.replace('_', '-')} {value}: must be at least {least}")
    config = configs.load(raw)
    for flag in ("stage_timers_interval", "exposed_communication_interval"):
        interval = getattr(arguments, flag, 0)
        if config.sequence_parallel.cuda_graphs and interval:
            raise UsageError(
                f"--{flag.replace('_', '-')} {interval} with CUDA graphs, within whose replays nothing is measured: give one "
                "of the two"
            )
    return config


def _fill_in(raw: dict[str, Any], path: tuple[str, ...], value: object, flag: str) -> None:
    """Set what the ds_config leaves out, and refuse what it says otherwise. ``flag``: as the user gave it."""
    section = raw
    for key in path[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise UsageError(f"config key {'.'.join(path[:-1])}={section!r} must be a section: {{...}}")
    given = section.setdefault(path[-1], value)
    if given != value:
        raise UsageError(
            f"{flag} and {'.'.join(path)}={given!r} of the ds_config disagree; give one of them, or the same value"
        )


def _settle_monitoring(arguments: argparse.Namespace, raw: dict[str, Any]) -> None:
    """Bring ``--tensorboard-dir`` to DeepSpeed's "tensorboard" section."""
    if arguments.tensorboard_dir is not None:
        flag = f"--tensorboard-dir {arguments.tensorboard_dir}"
        _fill_in(raw, ("tensorboard", "enabled"), True, flag)
        _fill_in(raw, ("tensorboard", "output_path"), str(arguments.tensorboard_dir), flag)
        raw["tensorboard"].setdefault("job_name", "")  # DeepSpeed writes to output_path/job_name, Megatron to its folder itself
    if arguments.profile and arguments.stage_timers_interval:
        raise UsageError("--profile and --stage-timers-interval both take torch's profiler, which runs once; give one of them")


def _settle_optimizer(arguments: argparse.Namespace, raw: dict[str, Any]) -> None:
    """Give the optimizer's flags their defaults, or refuse them where the ds_config has an optimizer of its own."""
    if "optimizer" not in raw:
        if "scheduler" in raw:
            raise UsageError('the ds_config has a "scheduler" but no "optimizer"; give both there, or use --lr and its kin')
        for flag, default in _OPTIMIZER_DEFAULTS.items():
            if getattr(arguments, flag) is None:
                setattr(arguments, flag, default)
        return
    for flag in _OPTIMIZER_DEFAULTS:
        if flag not in _CONFIG_KEYS and getattr(arguments, flag) is not None:
            raise UsageError(
                f'--{flag.replace("_", "-")} has no effect beside the "optimizer" section of the ds_config; '
                'set it there or in its "scheduler" section, or remove that section'
            )


def show(arguments: argparse.Namespace, file: Any = None) -> None:
    """Print all arguments, as Megatron does at start-up. ``file`` None: standard output."""
    print("------------------------ arguments ------------------------", file=file)
    for name, value in sorted(vars(arguments).items()):
        if name != "local_rank":
            print(f"  {name} {'.' * (48 - len(name))} {value}", file=file)
    print("-------------------- end of arguments ---------------------", file=file, flush=True)
