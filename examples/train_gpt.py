"""A small GPT with experts: train it on Python's own sources, then let it write.

    python examples/train_gpt.py --steps 1000    # two minutes on one core

The transformer comes from moe_ext.cli.gpt; this file has all that experts add. Every block's
feed-forward is a MOELayer of eight experts, two for each byte. The loss adds a hundredth of each
layer's l_aux, which keeps all experts in use. Ctrl-C ends the training and keeps the model.
"""

import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from torch import Tensor, nn
from tqdm import tqdm

import moe_ext
from moe_ext.cli.gpt import GPT, load_corpus, loss_of, windows

WIDTH, CONTEXT, EXPERTS = 128, 64, 8


def make_ffn() -> moe_ext.MOELayer:
    gate = moe_ext.TopKGate(WIDTH, EXPERTS, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
    return moe_ext.MOELayer(gate, moe_ext.GroupedExperts(EXPERTS, WIDTH, 2 * WIDTH))


def train(model: GPT, text: Tensor, steps: int, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    for step in (bar := tqdm(range(steps), unit="step", disable=None)):
        starts = torch.randint(len(text) - CONTEXT, (batch,))
        loss = loss_of(model, *windows(text, starts, CONTEXT))
        optimizer.zero_grad()
        (loss + 0.01 * moe_ext.total_l_aux(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(bits=f"{loss.item() / math.log(2):.3f}")
        if step in (0, steps - 1):
            tqdm.write(f"step {step}: {loss.item() / math.log(2):.4f} bits per byte")


@torch.no_grad()
def write(model: GPT, prompt: str, length: int) -> str:
    model.eval()
    text = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(text[:, -CONTEXT:])[:, -1]
        text = torch.cat([text, torch.multinomial((logits / 0.7).softmax(-1), 1)], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps (1000)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step (32)")
    parser.add_argument("--write", type=int, default=300, help="bytes to write at the end (300)")
    options = parser.parse_args()
    if min(options.steps, options.batch) < 1 or options.write < 0:
        parser.error("--steps and --batch must be at least 1, and --write at least 0")
    torch.manual_seed(0)
    model = GPT(WIDTH, heads=4, layers=2, context=CONTEXT, make_ffn=make_ffn)
    stats = moe_ext.stats.track(model)
    try:
        train(model, load_corpus().train, options.steps, options.batch)
    except KeyboardInterrupt:
        print("interrupted")
    print(stats.read())
    print(write(model, "def ", options.write))


if __name__ == "__main__":
    main()
