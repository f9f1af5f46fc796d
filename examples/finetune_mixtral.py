"""Train a small Mixtral with transformers' Trainer, with each implementation of its experts.

    pip install "transformers>=5.7" accelerate
    python examples/finetune_mixtral.py --steps 30    # half a minute on one core

Only `experts_implementation` differs between the runs. From the same seed all print the same
losses. Tokens per second are of whole training steps. The model predicts the next byte of Python's
own sources. --model takes another MoE model of the hub, or a folder.
"""

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments

import moe_ext.hf  # registers experts_implementation="moe_ext"
from moe_ext.cli.gpt import load_corpus

IMPLEMENTATIONS = ["eager", "grouped_mm", moe_ext.hf.NAME]


def sequences(length: int) -> list[dict]:
    text = load_corpus().train.long()
    return [{"input_ids": ids, "labels": ids} for ids in text.split(length)[:-1]]


def model_for(implementation: str, path: str | None) -> torch.nn.Module:
    if path:
        return AutoModelForCausalLM.from_pretrained(path, experts_implementation=implementation)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        output_router_logits=True,
    )
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


def train(implementation: str, options: Namespace) -> tuple[list[float], float]:
    """The loss of every step, and tokens per second after two steps of warm-up."""
    transformers.set_seed(0)
    model = model_for(implementation, options.model)
    arguments = TrainingArguments(
        output_dir="finetune-mixtral-out",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    clock = Clock()
    trainer = Trainer(model, arguments, train_dataset=sequences(options.length), callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses, options.batch * options.length / clock.seconds_per_step()


class Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        ends = self.ends[min(2, len(self.ends) - 2) :]
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float]]:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a model (a small new Mixtral)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (30)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (8)")
    parser.add_argument("--length", type=int, default=128, help="bytes per sequence (128)")
    text = f"of the experts, one or more ({' '.join(IMPLEMENTATIONS)})"
    parser.add_argument("--implementation", nargs="+", default=IMPLEMENTATIONS, help=text)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, as the first is not timed; got {options.steps}")
    if min(options.batch, options.length) < 1:
        parser.error("--batch and --length must be at least 1")
    results = {}
    for implementation in options.implementation:
        losses, speed = results[implementation] = train(implementation, options)
        change = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
        print(f"{implementation:12} loss {change}   {speed:8.0f} tokens/s")
    return results


if __name__ == "__main__":
    main()
