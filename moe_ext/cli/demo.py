"""Train a small byte-level GPT twice, with experts and dense, and compare the two.

Both models have the same attention and equally many active parameters, and see the same batches in
as many steps. So the MoE model's lower loss comes from its experts. `python -m moe_ext demo` runs
it. With `torchrun --nproc-per-node 2 -m moe_ext demo` the ranks share the experts and every batch.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import GroupedExperts, MOELayer, TopKGate
from ..monitor.plot import plot_curves, plot_run
from ..monitor.sinks import JsonLines, Sink, read_json_lines
from ..monitor.stats import Stats, track
from ..options import WeightFormat
from .doctor import crowded
from .gpt import GPT, Corpus, load_corpus, windows
from .torchrun import ALONE, Processes

STATS = "stats.jsonl"


@dataclass(frozen=True)
class Config:
    """layers, width, heads: of both models. ffn: inner size of an expert; k * ffn if dense.

    context: bytes that a model sees. batch: windows per step. learning_rate: the peak; half and
    twice as much are worse for both models. balance: factor on l_aux. holdout: one file in so many
    is held out. eval_windows: windows of the held-out files that are scored.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    ffn: int = 128
    experts: int = 16
    k: int = 2
    context: int = 64
    batch: int = 32
    steps: int = 500
    learning_rate: float = 4e-3
    balance: float = 0.01
    holdout: int = 10
    eval_windows: int = 512
    eval_every: int = 50
    seed: int = 0


class DenseFFN(nn.Module):
    """The dense model's feed-forward, a SwiGLU. [..., H] -> [..., H]"""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def make_model(config: Config, is_moe: bool) -> GPT:
    width, num_experts = config.width, config.experts

    def make_ffn() -> nn.Module:
        if not is_moe:
            return DenseFFN(width, config.k * config.ffn)
        gate = TopKGate(
            width, num_experts, k=config.k, drop_tokens=False, top2_2nd_expert_sampling=False
        )
        return MOELayer(gate, GroupedExperts(num_experts, width, config.ffn))

    return GPT(width, config.heads, config.layers, config.context, make_ffn)


def moe_layers(model: GPT) -> list[MOELayer]:
    return [layer for layer in model.modules() if isinstance(layer, MOELayer)]


def active_parameters(model: GPT) -> int:
    """Parameters used for one byte: k experts of each layer, without the gates."""
    total = sum(p.numel() for p in model.parameters())
    for layer in moe_layers(model):
        gate = layer.gate
        assert isinstance(gate, TopKGate)
        experts = sum(p.numel() for p in layer.experts.parameters())
        total -= experts - experts // gate.num_experts * gate.k
        total -= sum(p.numel() for p in gate.parameters())
    return total


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )


class Trainer:
    """One model in training. `step` trains on a batch; `evaluate` scores it and fills `result`."""

    def __init__(
        self,
        name: str,
        corpus: Corpus,
        config: Config,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        torch.manual_seed(config.seed)
        self.corpus, self.config, self.device, self.processes = corpus, config, device, processes
        self.model = make_model(config, is_moe=name == "moe").to(device)
        self.layers = moe_layers(self.model)
        self.result: dict = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "active_parameters": active_parameters(self.model),
        }
        self.wrapped = processes.wrap(self.model, self.layers)
        self.stats: Stats | None = track(self.model, detailed=True) if self.layers else None
        self.optimizer = optimizer_of(self.model, config)
        self.batches = torch.Generator().manual_seed(config.seed)
        self.seconds = 0.0
        self.recent: list[float] = []  # bits per byte of the steps since the last evaluation
        before = self.score()
        self.result |= {"bits_per_byte_before": before, "curve": [(0, before)], "train_curve": []}
        if self.stats:
            self.stats.reset()

    def loss(self, model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
        """Mean cross entropy in nats over the windows that begin at `starts`."""
        inputs, targets = windows(text, starts, self.config.context)
        logits = model(inputs.to(self.device))
        return F.cross_entropy(logits.flatten(0, 1), targets.to(self.device).flatten())

    @torch.no_grad()
    def score(self, model: nn.Module | None = None) -> float:
        """Held-out bits per byte over evenly spaced windows. model: another one than its own"""
        config, text, model = self.config, self.corpus.heldout, model or self.model
        model.eval()
        last = len(text) - config.context - 1
        starts = torch.linspace(0, last, config.eval_windows, dtype=torch.float64).long()
        nats = 0.0
        for chunk in map(self.processes.share, starts.split(config.batch)):
            nats += self.loss(model, text, chunk).item() * len(chunk)
        model.train()
        nats = float(self.processes.total(torch.tensor(nats, dtype=torch.float64)))
        return nats / config.eval_windows / math.log(2)

    def score_frozen(self) -> dict[str, float]:
        """Held-out bits per byte with the experts in 8 and 4 bits, where rows have whole groups."""
        scores = {}
        for format in get_args(WeightFormat):
            model = copy.deepcopy(self.model)
            try:
                for layer in moe_layers(model):
                    cast(GroupedExperts, layer.experts).quantize(format)
            except ValueError:
                continue
            scores[format] = self.score(model)
        return scores

    def step(self, number: int) -> None:
        begin = time.perf_counter()
        config, text = self.config, self.corpus.train
        starts = torch.randint(len(text) - config.context, (config.batch,), generator=self.batches)
        loss = self.loss(self.wrapped, text, self.processes.share(starts))
        balance = sum((layer.l_aux for layer in self.layers), torch.zeros((), device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        (loss + config.balance * balance).backward()
        self.processes.clip(self.model, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        self.optimizer.step()
        mean = self.processes.total(loss.detach()) / self.processes.size
        self.recent.append(mean.item() / math.log(2))
        self.seconds += time.perf_counter() - begin

    def evaluate(self, done: int, sink: Sink | None = None) -> float:
        """Held-out bits per byte after `done` steps. sink: takes the experts' statistics."""
        bits, result, config = self.score(), self.result, self.config
        result["curve"].append((done, bits))
        # The mean over the last steps is drawn at their middle.
        mean = sum(self.recent) / len(self.recent)
        result["train_curve"].append((done - len(self.recent) / 2, mean))
        self.recent.clear()
        result["bits_per_byte_after"] = bits
        result["tokens_per_second"] = done * config.batch * config.context / self.seconds
        result["seconds"] = self.seconds
        if self.stats:
            reading = self.stats.read(group=self.processes.group)
            result["load"] = [layer.shares.tolist() for layer in reading.eval.values()]
            if sink is not None:
                sink(reading, done)
        return bits


def train(
    name: str, trainer: Trainer, save: Callable[[], None] = lambda: None, sink: Sink | None = None
) -> dict:
    """Train to the end; call `save` after every evaluation. Returns the trainer's result."""
    config, is_first = trainer.config, trainer.processes.rank == 0
    save()
    bar = tqdm(
        range(config.steps),
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=None if is_first else True,
    )
    for step in bar:
        trainer.step(step)
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            reached = f"held-out {trainer.evaluate(done, sink):.3f} bits/byte"
            bar.set_postfix_str(reached)
            if bar.disable and is_first:  # a log, not a terminal
                print(f"{name}: step {done} of {config.steps}, {reached}", flush=True)
            save()
    return trainer.result


def report(results: dict) -> str:
    """The figures of both trained models as text."""
    lines = [
        "held-out bits per byte before and after training; parameters active per byte and in total",
        f"{'':8}{'before':>9}{'after':>9}{'tokens/s':>11}{'active':>10}{'total':>10}",
    ]
    for name, r in results["models"].items():
        lines.append(
            f"{name:8}{r['bits_per_byte_before']:9.3f}{r['bits_per_byte_after']:9.3f}"
            f"{r['tokens_per_second']:11.0f}{r['active_parameters']:10}{r['parameters']:10}"
        )
    moe, dense = (results["models"][name]["bits_per_byte_after"] for name in ("moe", "dense"))
    comparison = f"{abs(dense - moe):.3f} bits per byte {'fewer' if moe < dense else 'more'}"
    lines.append(
        f"the MoE model needs {comparison} than the dense model of equal active parameters"
    )
    if frozen := results["models"]["moe"].get("bits_per_byte_frozen"):
        after = results["models"]["moe"]["bits_per_byte_after"]
        losses = ", ".join(f"{format} {bits - after:+.4f}" for format, bits in frozen.items())
        lines.append(f"bits per byte that experts in 8 and 4 bits add: {losses}")
    steps = results["config"]["steps"]
    if steps < Config.steps // 2:
        lines.append(f"{steps} steps are too few to compare the two; the default is {Config.steps}")
    lines.append(f"elapsed: {results['seconds']:.0f} s")
    return "\n".join(lines)


def draw(results: dict, out: Path) -> None:
    # The loss before training would leave little of the scale for the rest.
    trained = {name: r for name, r in results["models"].items() if r.get("train_curve")}
    curves = {f"{name}, held out": r["curve"][1:] for name, r in trained.items()}
    curves |= {f"{name}, training": r["train_curve"] for name, r in trained.items()}
    if curves:
        title = "MoE and dense model of equal active parameters\non the source of Python's library"
        plot_curves(curves, out / "loss.png", title, "loss, bits per byte (lower is better)")
    lines = out / STATS
    if lines.exists():
        plot_run(list(read_json_lines(lines)), out)


def run(config: Config, device: str = "cpu", out: Path = Path("demo-out")) -> dict:
    """Train both models, write result.json, stats.jsonl and pictures to `out`, print the figures.

    If interrupted, it writes and draws what it has before it raises KeyboardInterrupt.
    """
    begin, started = time.perf_counter(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    processes = Processes.of_torchrun(torch.device(device))
    is_first = processes.rank == 0
    lines = JsonLines(out / STATS)
    if is_first:
        lines.path.unlink(missing_ok=True)
    corpus = load_corpus(config.holdout)
    results: dict = {
        "config": asdict(config),
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes.size,
        "corpus": {
            "train_bytes": len(corpus.train),
            "heldout_bytes": len(corpus.heldout),
            "train_files": corpus.train_files,
            "heldout_files": corpus.heldout_files,
        },
        "models": {},
    }

    def save() -> None:
        if is_first:
            # Replace the file in one step: an interruption leaves the old or the new one.
            part = out / "result.part"
            part.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(part, out / "result.json")

    say = print if is_first else lambda text: None
    if busy := crowded():
        say(busy)
    say(
        f"Python's own sources: {corpus.train_files} files ({len(corpus.train) / 1e6:.1f} MB) to "
        f"train on, {corpus.heldout_files} files ({len(corpus.heldout) / 1e6:.1f} MB) held out"
    )
    say(f"training a model with experts, then a dense one, {config.steps} steps each")
    try:
        for name in ("moe", "dense"):
            trainer = Trainer(name, corpus, config, torch.device(device), processes)
            results["models"][name] = trainer.result
            train(name, trainer, save, lines if is_first else None)
            if trainer.layers and processes.size == 1:
                trainer.result["bits_per_byte_frozen"] = trainer.score_frozen()
                save()
    finally:
        results["seconds"] = time.perf_counter() - begin
        if is_first:
            save()
            draw(results, out)
        processes.end()
    if not is_first:
        return results
    print(report(results))
    for _, reading in list(read_json_lines(lines.path))[-1:]:
        print(reading)
    print(f"to draw the experts of one layer: python -m moe_ext plot {lines.path} --layer NAME")
    written = sorted(path for path in out.iterdir() if path.stat().st_mtime >= started)
    print(f"wrote {', '.join(path.name for path in written)} to {out}")
    return results
