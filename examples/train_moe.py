"""A training script written for DeepSpeed's MoE layer, of which only the imports were changed.

    python examples/train_moe.py --steps 200    # ten seconds on one core

It predicts the next byte of Python's own sources from the sixteen before. With `deepspeed.moe` in
place of `moe_ext.deepspeed` it prints the same losses from the same seed. With --engine it trains
under deepspeed.initialize, which needs DeepSpeed:

    torchrun --nproc-per-node 2 examples/train_moe.py --engine --zero 1 --ep-size 2
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from moe_ext.cli.gpt import load_corpus

# Before: from deepspeed.moe.layer import MoE, and so on.
from moe_ext.deepspeed.layer import MoE
from moe_ext.deepspeed.utils import (
    has_moe_layers,
    split_params_into_different_moe_groups_for_optimizer,
)

CONTEXT, WIDTH, BATCH = 16, 64, 256


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(hidden)))


class Model(nn.Module):
    def __init__(self, ep_size: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.mix = nn.Linear(CONTEXT * WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            [
                MoE(WIDTH, Expert(), 8, ep_size, k=1, use_residual=True, min_capacity=0),
                MoE(WIDTH, Expert(), 8, ep_size, k=2, capacity_factor=1.25),
                MoE(WIDTH, Expert(), 8, ep_size, k=4, drop_tokens=False),
            ]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.layers)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """context: [B, CONTEXT] bytes -> (logits of the next byte [B, 256], the sum of l_aux)."""
        hidden = self.mix(self.embedding(context).flatten(1))
        l_aux = 0.0
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out, layer_loss, _ = layer(norm(hidden))
            hidden, l_aux = hidden + out, l_aux + layer_loss
        return self.head(hidden), l_aux


def engine_of(model: nn.Module, zero: int):
    """The model in DeepSpeed's engine, in one process or under torchrun."""
    import deepspeed

    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in {**alone, "MASTER_PORT": 29500}.items():
        os.environ.setdefault(name, str(value))
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 2e-3}},
        "zero_optimization": {"stage": zero},
    }
    parameters = list(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    return engine


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps (200)")
    parser.add_argument("--seed", type=int, default=0, help="of torch's generator (0)")
    parser.add_argument("--engine", action="store_true", help="train under deepspeed.initialize")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2], default=0, help="ZeRO's stage")
    parser.add_argument("--ep-size", type=int, default=1, help="ranks that share the experts")
    args = parser.parse_args()
    if not args.engine and (args.zero, args.ep_size) != (0, 1):
        parser.error("--zero and --ep-size need --engine")
    if min(args.steps, args.ep_size) < 1:
        parser.error("--steps and --ep-size must be at least 1")
    torch.manual_seed(args.seed)

    data = load_corpus().train
    model = Model(args.ep_size)
    assert has_moe_layers(model) == (True, 8)
    if args.engine:
        engine = engine_of(model, args.zero)
        rank, device = dist.get_rank(), engine.device
    else:
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "model"}
        )
        optimizer = torch.optim.AdamW(groups, lr=2e-3)
        engine, rank, device = model, 0, torch.device("cpu")
    draws = torch.Generator().manual_seed(args.seed + rank)
    windows = data.unfold(0, CONTEXT + 1, 1)
    for step in (bar := tqdm(range(args.steps), unit="step", disable=True if rank else None)):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=draws)].long().to(device)
        logits, l_aux = engine(batch[:, :-1])
        loss = F.cross_entropy(logits, batch[:, -1])
        if args.engine:
            engine.backward(loss + 0.01 * l_aux)
            engine.step()
        else:
            optimizer.zero_grad()
            (loss + 0.01 * l_aux).backward()
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            tqdm.write(f"step {step}: loss {loss.item():.4f}, l_aux {l_aux.item():.4f}")
    if args.engine:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
