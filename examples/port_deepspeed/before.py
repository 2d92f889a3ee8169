"""Trains a small video model with DeepSpeed: a transformer that attends over time and over space in turns."""

import argparse

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset


class NoisyWaves(Dataset):
    """Pairs of a noisy clip and the clean one, each [frames, tokens, features]."""

    def __init__(self, samples: int, frames: int, tokens: int, features: int):
        self.samples, self.frames, self.tokens, self.features = samples, frames, tokens, features

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        speed, length, phase = torch.rand(3, self.features, generator=generator)
        time, space = torch.arange(self.frames)[:, None, None], torch.arange(self.tokens)[:, None]
        clean = torch.sin(speed * time + length * space + 6 * phase)
        return clean + 0.5 * torch.randn(clean.shape, generator=generator), clean


class VideoTransformer(nn.Module):
    """Maps clips [B, T, S, features] to clips of the same shape."""

    def __init__(self, frames: int, tokens: int, features: int, width: int, layers: int, dropout: float):
        super().__init__()

        def block() -> nn.Module:
            return nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=True)

        self.embed = nn.Linear(features, width)
        self.time_positions = nn.Parameter(0.02 * torch.randn(frames, 1, width))
        self.space_positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.temporal = nn.ModuleList(block() for _ in range(layers))
        self.spatial = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.time_positions + self.space_positions
        for temporal, spatial in zip(self.temporal, self.spatial, strict=True):
            x = attend(temporal, x.transpose(1, 2)).transpose(1, 2)
            x = attend(spatial, x)
        return self.head(self.norm(x))


def attend(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block over the third dim of x, every position of the first two apart."""
    return block(x.flatten(0, 1)).view(x.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--frames", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=9)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1234)
    args = deepspeed.add_config_arguments(parser).parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    data = NoisyWaves(args.samples, args.frames, args.tokens, features=8)
    model = VideoTransformer(args.frames, args.tokens, features=8, width=32, layers=2, dropout=args.dropout)
    engine, _, loader, _ = deepspeed.initialize(args, model, training_data=data)

    late_frames_count_more = torch.linspace(0.5, 1.5, args.frames, device=engine.device)[:, None, None]
    losses = []
    for epoch in range(args.epochs):
        loader.data_sampler.set_epoch(epoch)
        for noisy, clean in loader:
            noisy, clean = noisy.to(engine.device), clean.to(engine.device)
            loss = (late_frames_count_more * (engine(noisy) - clean) ** 2).mean()
            engine.backward(loss)
            losses.append(loss.detach())
            if engine.is_gradient_accumulation_boundary():
                mean = torch.stack(losses).mean()
                losses.clear()
                dist.all_reduce(mean)
                if dist.get_rank() == 0:
                    print(f"step {engine.global_steps + 1} loss {mean.item() / dist.get_world_size():.8f}", flush=True)
            engine.step()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
