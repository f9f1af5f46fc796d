"""DeepSpeed's `deepspeed.moe.mappings`; the process group is an argument, not a global."""

from ..parallel.tensor_parallel import drop_tokens, gather_tokens

__all__ = ["drop_tokens", "gather_tokens"]
