"""DeepSpeed's `deepspeed.moe.mappings`, with the process group as an argument where DeepSpeed has a
global one.
"""

from ..parallel.tensor_parallel import drop_tokens, gather_tokens

__all__ = ["drop_tokens", "gather_tokens"]
