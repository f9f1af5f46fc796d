"""DeepSpeed's `deepspeed.moe` under its own module names: `layer`, `sharded_moe`, `experts`,
`mappings` and `utils`.

A script replaces `deepspeed.moe` by `moe_ext.deepspeed` in its imports and keeps the rest, calls to
`deepspeed.initialize` included. DeepSpeed need not be installed.
"""
