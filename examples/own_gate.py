"""Write your own gate with the package's operators, and train a layer with it.

    python examples/own_gate.py --steps 300    # five seconds on one core

A gate is a module with `num_experts` and `route(tokens, used_token) -> Routing`. This one learns a
temperature, sends a token to one expert alone if its first weight is above a half, and keeps the
logits small by a z-loss. The task: each token needs one of eight rotations, named by its first
numbers, so each expert can learn one rotation.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext
from moe_ext import losses

WIDTH, EXPERTS, BATCH = 32, 8, 512


class SureGate(nn.Module):
    def __init__(self, width: int, num_experts: int, capacity_factor: float = 1.5) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.router = nn.Linear(width, num_experts, bias=False)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def route(self, tokens: Tensor, used_token: Tensor | None = None) -> moe_ext.Routing:
        T, E = tokens.shape[0], self.num_experts
        logits = self.router(tokens.float()) / self.log_temperature.exp()
        choice = moe_ext.gate(logits, 2)
        # An id of -1 makes no route: no row, no product, no load.
        is_sure = (choice.weights[:, :1] > 0.5) & (torch.arange(2, device=tokens.device) == 1)
        experts = choice.expert_ids.masked_fill(is_sure, -1)
        if used_token is not None:
            experts = experts.masked_fill(used_token.reshape(-1, 1) == 0, -1)
        capacity = int(self.capacity_factor * 2 * T / E)
        plan = moe_ext.make_plan(experts, E, capacity, priority=choice.weights.detach())
        weights = moe_ext.mask_weights(choice.weights, plan, normalize=True)
        l_aux = losses.load_balance_loss(choice.importance, plan.load, T, 2)
        l_aux = l_aux + 0.1 * losses.z_loss(logits)
        return moe_ext.Routing(weights, plan, choice.probs, choice.importance, l_aux, logits)


def batch(rotations: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and the rotated tokens, both [BATCH, WIDTH]."""
    kind = torch.randint(EXPERTS, (BATCH,))
    tokens = torch.randn(BATCH, WIDTH)
    tokens[:, :EXPERTS] = 3 * F.one_hot(kind, EXPERTS)
    return tokens, torch.einsum("thw,tw->th", rotations[kind], tokens)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (300)")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    torch.manual_seed(0)
    rotations = torch.linalg.qr(torch.randn(EXPERTS, WIDTH, WIDTH)).Q
    gate = SureGate(WIDTH, EXPERTS)
    layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(EXPERTS, WIDTH, 2 * WIDTH))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    stats = moe_ext.stats.track(layer, detailed=True)
    for step in (bar := tqdm(range(steps), unit="step", disable=None)):
        tokens, wanted = batch(rotations)
        loss = F.mse_loss(layer(tokens), wanted)
        optimizer.zero_grad()
        (loss + 0.01 * layer.l_aux).backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step in (0, steps - 1):
            tqdm.write(f"step {step}: loss {loss.item():.4f}")
    reading = stats.read().train["MOELayer"]
    routes = int(reading.load.sum()) / reading.tokens
    temperature = gate.log_temperature.exp().item()
    print(f"{routes:.2f} experts per token over all steps, temperature {temperature:.2f}")


if __name__ == "__main__":
    main()
