"""The step again that made a run stop for not being finite: `granvit train replay RUN/faults/STAGE-STEP`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from granvit.train.checkpoint import read_values
from granvit.train.guard import Termination
from granvit.train.presets import TrainConfig
from granvit.train.run import Run
from granvit.world import World, start


def replay(dump: Path, device: str = "auto") -> bool:
    """Take the dumped step again and print where numbers stop being finite, in the order in which they did. Returns
    whether any did. One process does what all ranks of the run did.

    Raises ValueError for a folder that is no dump, and where the data is not what it was.
    """
    values = read_values(dump)
    try:
        config = TypeAdapter(TrainConfig).validate_python(values["config"])
        stage = {stage.name: stage for stage in (config.warmup, *config.stages)}[values["stage"]]
    except (KeyError, ValidationError) as error:
        raise ValueError(f"{dump} is no dump of a step that this version can take again: {error}") from error
    config = replace(config, trackers=())  # this is no part of the run
    _, chosen = start(device)
    run = Run(config, dump.resolve().parents[1], World(), chosen, Termination())
    phase = run.new_phase(stage, run.model)
    phase.resume(dump, whole=True)
    watch = Watch(run.model)
    phase.take(next(phase.batches()))
    (line,) = phase.read()
    table = Table("module", "what is not finite", title=f"{stage.name} step {phase.step}")
    for row in watch.causes:
        table.add_row(*row)
    finite = f"{stage.name} step {phase.step}: every number is finite: {line}"
    Console(markup=False, emoji=False).print(table if watch.causes else finite)
    return bool(watch.causes)


class Watch:
    """Which modules turn finite inputs into outputs that are not, and which parameters have or get such values."""

    def __init__(self, model: nn.Module) -> None:
        self.causes = [(name, "weight") for name, value in model.named_parameters() if not _finite(value)]
        for name, module in model.named_modules():
            module.register_forward_hook(self._forward(name))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient(name))

    def _forward(self, name: str):
        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            if _finite(inputs) and not _finite(output):
                self.causes.append((name or type(module).__name__, "output, of finite input"))

        return look

    def _gradient(self, name: str):
        def look(parameter: nn.Parameter) -> None:
            if not _finite(parameter.grad):
                self.causes.append((name, "gradient"))

        return look


def _finite(values: object) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _floats(values))


def _floats(values: object) -> Iterator[Tensor]:
    yield from (tensor for tensor in tree_leaves(values) if isinstance(tensor, Tensor) and tensor.is_floating_point())
