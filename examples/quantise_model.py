"""Freeze the experts of a model of transformers in 4 bits, and let it write.

    pip install "transformers>=5.23" accelerate
    python examples/quantise_model.py                   # trains a small Mixtral first: a minute
    python examples/quantise_model.py --model PATH --format int8

Prints what each layer loses, then for the whole and for the packed model: the experts' megabytes,
the loss of a text, tokens per second and what it writes. --model takes another MoE model of the
hub, or a folder, with its tokenizer. The small one reads and writes the bytes of Python's sources.
"""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

import moe_ext.hf
from moe_ext.cli.gpt import load_corpus, windows

PROMPT = "def __init__(self, name, "
CONTEXT = 128


def train(folder: Path, steps: int) -> None:
    """Train a small Mixtral on bytes, and save it."""
    transformers.set_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation=moe_ext.hf.NAME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    text = load_corpus().train
    for _ in tqdm(range(steps), desc="training", unit="step"):
        ids, _ = windows(text, torch.randint(len(text) - CONTEXT, (16,)), CONTEXT)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def show(name: str, model, tokenizer, text: torch.Tensor, count: int) -> None:
    model.eval()
    with torch.no_grad():
        loss = float(model(input_ids=text, labels=text).loss)
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        transformers.set_seed(0)
        begin = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "temperature": 0.7}
        written = model.generate(ids, **options, do_sample=True, pad_token_id=0)
        seconds = time.perf_counter() - begin
    weights = (p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    print(
        f"{name}: experts {sum(weights) / 1e6:.2f} MB, loss {loss:.4f}, "
        f"{count / seconds:.0f} tokens/s\n{tokenizer.decode(written[0].tolist())}\n"
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--format", default="int4", help="int8, int4 (default), mxfp4 or nf4")
    parser.add_argument("--steps", type=int, default=600, help="of the small model's training")
    parser.add_argument("--tokens", type=int, default=60, help="to write")
    parser.add_argument("--out", type=Path, default=Path("quantise-model-out"))
    options = parser.parse_args()
    path = options.model
    if path is None:
        path = options.out / "whole"
        train(path, options.steps)
    tokenizer = AutoTokenizer.from_pretrained(path) if options.model else Bytes()
    held_out = bytes(load_corpus().heldout[:40_000].tolist()).decode(errors="replace")
    text = torch.tensor(tokenizer.encode(held_out)[: 16 * CONTEXT]).view(-1, CONTEXT)

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation=moe_ext.hf.NAME)
    print(moe_ext.hf.report(model, options.format, inputs=text), end="\n\n")
    show("whole", model, tokenizer, text, options.tokens)
    del model
    packed = moe_ext.hf.from_pretrained(path, options.format)
    packed.save_pretrained(options.out / options.format)
    show(options.format, packed, tokenizer, text, options.tokens)
    print(f"the packed model is in {options.out / options.format}")


if __name__ == "__main__":
    main()
