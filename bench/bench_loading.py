"""The peak memory of a model whose experts are packed while it is loaded.

    python bench/bench_loading.py [--layers 12] [--format int4]

Makes a Mixtral of bfloat16 numbers in a temporary folder, of 0.2 GB a layer, and loads it in a
process of its own by moe_ext.hf.from_pretrained. "Peak" is the most memory that was resident, less
what was before the load, and "limit" is 1.15 times the packed model and one shard. Writes
bench/results/<machine>/loading.json after a run of 12 layers and all formats.
"""

import resource
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from common import keep, parser, positive, setting
from report import loading_table
from tqdm import tqdm

SHARD = 500_000_000
FORMATS = ["int8", "int4", "mxfp4", "nf4"]


def make(folder: str, layers: int, hidden: int, shard: int) -> int:
    """Write the model; its bytes."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
        dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return sum(parameter.nbytes for parameter in model.parameters())


def resident() -> int:
    """The most bytes of this process that were resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: str, format: str) -> dict[str, int]:
    import moe_ext.hf

    before = resident()
    model = moe_ext.hf.from_pretrained(folder, format)
    packed = sum(parameter.nbytes for parameter in model.parameters())
    return {"packed": packed, "before": before, "peak": resident() - before}


def in_new_process(function: Callable, *args):
    # A process that is forked has what its parent has.
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measure(layers: int, formats: list[str], hidden: int = 1024, shard: int = SHARD) -> list[dict]:
    """Bytes of the model, of its largest file, and of each load."""
    with tempfile.TemporaryDirectory() as folder:
        whole = in_new_process(make, folder, layers, hidden, shard)
        largest = max(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        loads = []
        for format in tqdm(formats, unit="load", leave=False):
            found = in_new_process(load, folder, format)
            limit = round(1.15 * found["packed"] + largest)
            loads.append(
                {"format": format, "whole": whole, "shard": largest, **found, "limit": limit}
            )
    return loads


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=positive, default=12)
    options.add_argument("--format", nargs="*", default=FORMATS, choices=FORMATS)
    options = options.parse_args(arguments)
    report = setting(torch.device("cpu"))
    report["loads"] = measure(options.layers, options.format)
    print(loading_table(report))
    is_whole = options.layers == 12 and options.format == FORMATS
    keep(report, "loading" if is_whole else None, options.out)


if __name__ == "__main__":
    main()
