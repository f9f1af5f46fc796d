"""A small byte-level language model, once with MOELayer and once dense, on Python's own sources.

Both models have the same attention, the same active parameters, the same batches, learning rates
and steps, so that the MoE model's lower loss is what its many experts give. Whole files are held
out. `python -m moe_ext demo` runs it; under torchrun, as in
`torchrun --nproc-per-node 2 -m moe_ext demo`, the processes share the experts and every batch.
"""

import json
import math
import os
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import GroupedExperts, MOELayer, TopKGate
from ..monitor.plot import plot_curves, plot_run
from ..monitor.sinks import JsonLines, Sink, read_json_lines
from ..monitor.stats import track
from .doctor import crowded
from .torchrun import ALONE, Processes

STATS = "stats.jsonl"


@dataclass(frozen=True)
class Config:
    """layers, width, heads: of both models. ffn: of an expert; the dense model has k * ffn.

    context: bytes a model sees. batch: windows per step. learning_rate: the peak; half and twice
    as much are worse for both models. holdout: every how many files one is held out. eval_windows:
    windows of the held-out files that are scored. balance: factor on l_aux.
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
    """The dense model's feed-forward: one SwiGLU. hidden [..., H] -> the same."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def moe_ffn(config: Config) -> MOELayer:
    gate = TopKGate(
        config.width,
        config.experts,
        k=config.k,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    )
    return MOELayer(gate, GroupedExperts(config.experts, config.width, config.ffn))


class Block(nn.Module):
    def __init__(self, config: Config, ffn: nn.Module) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)
        self.norm2 = nn.LayerNorm(config.width)
        self.ffn = ffn

    def forward(self, hidden: Tensor) -> Tensor:
        batch, context, width = hidden.shape
        q, k, v = (
            self.qkv(self.norm1(hidden))
            .view(batch, context, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(batch, context, width))
        return hidden + self.ffn(self.norm2(hidden))


class ByteModel(nn.Module):
    """Bytes [B, L] int64 -> logits of the next byte [B, L, 256]."""

    def __init__(self, config: Config, is_moe: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, config.width)
        self.position = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config, moe_ffn(config) if is_moe else DenseFFN(config.width, config.k * config.ffn)
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embed(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    def moe_layers(self) -> list[MOELayer]:
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MOELayer)]


def active_parameters(model: ByteModel) -> int:
    """Parameters that one byte meets: of the experts its k, and not the gate's."""
    total = sum(p.numel() for p in model.parameters())
    for layer in model.moe_layers():
        gate = layer.gate
        assert isinstance(gate, TopKGate)
        experts = sum(p.numel() for p in layer.experts.parameters())
        total -= experts - experts // gate.num_experts * gate.k
        total -= sum(p.numel() for p in gate.parameters())
    return total


@dataclass(frozen=True)
class Corpus:
    """train, heldout: the files' bytes one after the other, uint8. No file is in both."""

    train: Tensor
    heldout: Tensor
    train_files: int
    heldout_files: int


def load_corpus(config: Config) -> Corpus:
    """The standard library's own .py files, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    texts = [path.read_bytes() for path in paths]

    def joined(files: list[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)

    heldout = texts[:: config.holdout]
    train = [text for i, text in enumerate(texts) if i % config.holdout]
    return Corpus(joined(train), joined(heldout), len(train), len(heldout))


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of `text`: inputs and the bytes that follow them, both [B, L] int64."""
    index = starts.unsqueeze(1) + torch.arange(context + 1)
    bytes_ = text[index].long()
    return bytes_[:, :-1], bytes_[:, 1:]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(
    model: ByteModel,
    corpus: Corpus,
    config: Config,
    device: torch.device,
    processes: Processes = ALONE,
) -> float:
    """Held-out bits per byte over evenly spaced windows."""
    model.eval()
    last = len(corpus.heldout) - config.context - 1
    starts = torch.linspace(0, last, config.eval_windows, dtype=torch.float64).long()
    nats = 0.0
    for chunk in map(processes.share, starts.split(config.batch)):
        inputs, targets = windows(corpus.heldout, chunk, config.context)
        nats += loss_of(model, inputs.to(device), targets.to(device)).item() * len(chunk)
    model.train()
    nats = float(processes.total(torch.tensor(nats, dtype=torch.float64)))
    return nats / config.eval_windows / math.log(2)


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    name: str,
    corpus: Corpus,
    config: Config,
    device: torch.device,
    result: dict,
    save,
    processes: Processes = ALONE,
    sink: Sink | None = None,
):
    """Train one model; fills `result` as it goes and calls `save` after every evaluation.

    sink: takes what the experts were asked for between two evaluations
    """
    torch.manual_seed(config.seed)
    model = ByteModel(config, is_moe=name == "moe").to(device)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["active_parameters"] = active_parameters(model)
    wrapped = processes.wrap(model, model.moe_layers())
    stats = track(model, detailed=True) if model.moe_layers() else None
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
    batches = torch.Generator().manual_seed(config.seed)
    result["bits_per_byte_before"] = evaluate(model, corpus, config, device, processes)
    result["curve"] = [(0, result["bits_per_byte_before"])]
    result["train_curve"] = []
    seconds, recent = 0.0, []
    if stats:
        stats.reset()
    save()

    bar = tqdm(
        range(config.steps),
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=True if processes.rank else None,
    )
    for step in bar:
        begin = time.perf_counter()
        starts = torch.randint(
            len(corpus.train) - config.context, (config.batch,), generator=batches
        )
        inputs, targets = windows(corpus.train, processes.share(starts), config.context)
        loss = loss_of(wrapped, inputs.to(device), targets.to(device))
        balance = sum((layer.l_aux for layer in model.moe_layers()), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        (loss + config.balance * balance).backward()
        processes.clip(model, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        of_all = processes.total(loss.detach()) / processes.size
        recent.append(of_all.item() / math.log(2))
        seconds += time.perf_counter() - begin

        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            bits = evaluate(model, corpus, config, device, processes)
            result["curve"].append((done, bits))
            # A mean over the last steps stands at their middle.
            result["train_curve"].append((done - len(recent) / 2, sum(recent) / len(recent)))
            recent.clear()
            result["bits_per_byte_after"] = bits
            result["tokens_per_second"] = done * config.batch * config.context / seconds
            result["seconds"] = seconds
            if stats:
                reading = stats.read(group=processes.group)
                result["load"] = [layer.shares.tolist() for layer in reading.eval.values()]
                if sink is not None:
                    sink(reading, done)
            reached = f"held-out {bits:.3f} bits/byte"
            bar.set_postfix_str(reached)
            if bar.disable and processes.rank == 0:  # a log, not a terminal
                print(f"{name}: step {done} of {config.steps}, {reached}", flush=True)
            save()


def write_json(path: Path, data: dict) -> None:
    """Replace the file at once: an interruption leaves the old or the new one, never half."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def report(results: dict) -> str:
    """The figures of both models as text, once both are trained."""
    lines = [
        "held-out bits per byte, before and after training; parameters used per byte, and all",
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
        f"the MoE model needs {comparison} than the dense one with as many active parameters"
    )
    steps = results["config"]["steps"]
    if steps < Config.steps // 2:
        lines.append(f"{steps} steps are too few to compare the two; the default is {Config.steps}")
    lines.append(f"elapsed: {results['seconds']:.0f} s")
    return "\n".join(lines)


def draw(results: dict, out: Path) -> None:
    # What a model knows before training is off the scale of what it learns.
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

    Interrupted, it keeps what it has, draws it, and raises KeyboardInterrupt again.
    """
    begin, started = time.perf_counter(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    processes = Processes.of_torchrun(torch.device(device))
    is_first = processes.rank == 0
    lines = JsonLines(out / STATS)
    if is_first:
        lines.path.unlink(missing_ok=True)
    corpus = load_corpus(config)
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
            write_json(out / "result.json", results)

    say = print if is_first else lambda text: None
    if load := crowded():
        say(f"load {load}")
    say(
        f"{corpus.train_files} files, {len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{corpus.heldout_files} files, {len(corpus.heldout) / 1e6:.1f} MB held out"
    )
    try:
        for name in ("moe", "dense"):
            result: dict = {}
            results["models"][name] = result
            train(
                name,
                corpus,
                config,
                torch.device(device),
                result,
                save,
                processes,
                lines if is_first else None,
            )
    finally:
        results["seconds"] = time.perf_counter() - begin
        if is_first:
            save()
            draw(results, out)
        processes.end()
    say(report(results))
    if is_first:
        for _, reading in list(read_json_lines(lines.path))[-1:]:
            print(reading)
    say(f"python -m moe_ext plot {lines.path}    tells more of the experts")
    written = sorted(path for path in out.iterdir() if path.stat().st_mtime >= started)
    say(f"wrote {', '.join(path.name for path in written)} to {out}")
    return results
