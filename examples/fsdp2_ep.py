"""Divide experts among ranks, and shard everything else with FSDP2.

    torchrun --nproc-per-node 2 examples/fsdp2_ep.py --steps 100    # ten seconds on two cores

Each of two ranks holds four of eight experts and half of all other parameters; tokens are sent to
their experts. With `python` in place of torchrun there is one rank, with the same losses except for
rounding, because the balance loss is of the whole batch. CPUs use gloo, GPUs NCCL (untested).
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext
from moe_ext import parallel
from moe_ext.routing.losses import load_balance_loss

WIDTH, EXPERTS, BATCH = 64, 8, 256


def balance(routing: moe_ext.Routing) -> Tensor:
    """This rank's part of the balance loss over the tokens of all ranks."""
    T, K = routing.weights.shape
    load = routing.plan.load
    return load_balance_loss(routing.importance, load, T, K, group=dist.group.WORLD)


class Block(nn.Module):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        gate = moe_ext.TopKGate(
            WIDTH, EXPERTS, k=2, drop_tokens=False, top2_2nd_expert_sampling=False, aux_loss=balance
        )
        # Every rank makes all experts from the same seed and keeps its part.
        experts = moe_ext.GroupedExperts(EXPERTS, WIDTH, 2 * WIDTH)
        self.moe = moe_ext.MOELayer(gate, moe_ext.ExpertParallel.of(experts, group))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + F.gelu(self.mix(hidden))
        return hidden + self.moe(self.norm(hidden))


def batch(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch that is the same for any number of ranks."""
    draws = torch.Generator().manual_seed(step)
    tokens = torch.randn(BATCH, WIDTH, generator=draws)
    wanted = tokens.roll(1, dims=-1).sin() * 2
    return tokens[rank::size], wanted[rank::size]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps (100)")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    has_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda" if torch.cuda.is_available() and has_gpus else "cpu")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.setdefault("MASTER_PORT", "29511")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    groups = parallel.make_groups(ep=size, device_type=device.type)
    model = nn.Sequential(Block(groups.ep), Block(groups.ep)).to(device)
    stats = moe_ext.stats.track(model)
    parallel.fully_shard(model, groups)
    experts = [p for p in model.parameters() if not getattr(p, "allreduce", True)]
    others = [p for p in model.parameters() if getattr(p, "allreduce", True)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": experts}], lr=3e-3)
    for step in tqdm(range(steps), unit="step", disable=True if rank else None):
        tokens, wanted = (part.to(device) for part in batch(step, rank, size))
        loss = F.mse_loss(model(tokens), wanted)
        optimizer.zero_grad()
        (loss + 0.01 * moe_ext.total_l_aux(model)).backward()
        parallel.clip_grad_norm_(model, groups, 1.0)
        optimizer.step()
        if step in (0, steps - 1):
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                tqdm.write(f"step {step}: loss {mean.item() / size:.4f}")
    reading = stats.read(group=dist.group.WORLD)
    if rank == 0:
        print(f"{size} rank{'s' * (size > 1)}\n{reading}")
    dist.destroy_process_group()
    if device.type == "cpu":
        # FSDP2's caches keep gloo's threads. One that lets go of a tensor while Python ends aborts
        # the process (torch 2.13): it ends here, without Python's own end.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
