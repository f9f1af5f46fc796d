"""Count the load of a model's experts while a Trainer trains it."""

import torch
import torch.distributed as dist
import transformers

from ..monitor.sinks import Sink
from ..monitor.stats import Stats, track


class StatsCallback(transformers.TrainerCallback):
    """Count the load of a model's experts while a Trainer trains it (see `moe_ext.stats`):

        Trainer(model, ..., callbacks=[moe_ext.hf.StatsCallback(JsonLines("run.jsonl"))])

    At every log the numbers are added to the Trainer's logs and its log history. Callbacks that a
    Trainer runs before this one, as TensorBoard's, do not see them: use a sink instead.

    Args:
        *sinks: called with every reading and its step, in the main process only
        per_layer: log the numbers of every layer, not only their mean and the worst
        detailed: as in `stats.track`
        group: the process group to sum over. None is the default group; if transformers divides the
            experts, nothing is summed and every process counts its own experts

    Raises:
        ValueError: a sink is not a function
    """

    def __init__(
        self,
        *sinks: Sink,
        per_layer: bool = False,
        detailed: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        for sink in sinks:
            if not callable(sink):
                raise ValueError(
                    "StatsCallback: a sink must be a function of a reading and a step, as "
                    f"JsonLines(path), got {sink!r}"
                )
        self.sinks = sinks
        self.per_layer = per_layer
        self.detailed = detailed
        self.group = group
        self.stats: Stats | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.stats = track(model, detailed=self.detailed)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.stats is None:
            return
        group = self.group
        if group is None and torch.distributed.is_initialized() and not self.stats.is_divided:
            group = torch.distributed.group.WORLD
        reading = self.stats.read(group=group)
        numbers = reading.scalars(per_layer=self.per_layer)
        if logs is not None:
            logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
        if state.is_world_process_zero:
            for sink in self.sinks:
                sink(reading, state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        assert self.stats is not None
        self.stats.stop()
