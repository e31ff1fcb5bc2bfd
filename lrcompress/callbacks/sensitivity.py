"""Per-layer sensitivity: the rise of the validation loss with one layer replaced at a time."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lrcompress.callbacks import trainer_state
from lrcompress.engine.progress import Track, untracked
from lrcompress.errors import SettingError
from lrcompress.report.record import LayerRecord
from lrcompress.report.summary import loss_name
from lrcompress.statistics.views import view
from lrcompress.structure.surgery import replace_


class DenseLayers:
    """The layers of a model as they are before a point, to measure what each one loses.

    Args:
        module: the model.
        names: of its layers.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.layers = {name: module.get_submodule(name) for name in names}
        self.biases = _biases(self.layers)  # factored layers take the parameters over
        # a point empties what it has replaced on an accelerator
        every = [p for layer in self.layers.values() for p in layer.parameters()]
        self.emptied = [(p, p.device, p.detach().cpu()) for p in every if p.device.type != "cpu"]

    @torch.no_grad()
    def loss_increases(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        records: Sequence[LayerRecord],
        track: Track = untracked,
    ) -> dict[str, float]:
        """Return by how much the validation loss rises with each layer alone replaced.

        Args:
            trainer: which validates once, and once more for each layer.
            module: in which all of them are replaced, before and after the call.
            records: of the layers; those left dense lose nothing and are not measured.
            track: yields layers while they are measured.

        Returns:
            Layer name to change; empty where validation has no loss.
        """
        for parameter, device, value in self.emptied:
            if not parameter.numel():
                parameter.data = value.to(device)
        new = {name: module.get_submodule(name) for name in self.layers}
        biases = _biases(new)
        found: dict[str, float] = {}
        try:
            for name in new:
                _swap_(module, name, self.layers[name], self.biases[name])
            start = trainer_state.run_validation(trainer)
            loss = loss_name(start)
            changed = [x.name for x in records if new[x.name] is not self.layers[x.name]]
            for name in track(changed, "measuring") if loss is not None else ():
                assert loss is not None
                _swap_(module, name, new[name], biases[name])
                found[name] = trainer_state.run_validation(trainer)[loss] - start[loss]
                _swap_(module, name, self.layers[name], self.biases[name])
        finally:
            for name, layer in new.items():
                _swap_(module, name, layer, biases[name])
        return found


def _biases(layers: Mapping[str, nn.Module]) -> dict[str, Tensor | None]:
    held = {name: view(layer).bias for name, layer in layers.items()}
    return {name: None if bias is None else bias.detach().clone() for name, bias in held.items()}


def _swap_(module: nn.Module, name: str, layer: nn.Module, bias: Tensor | None) -> None:
    if module.get_submodule(name) is not layer:
        replace_(module, name, layer)
    own = view(layer).bias
    if own is not None and bias is not None:
        own.copy_(bias)


def check_measurable(*, searched: bool, narrow_blocks: bool) -> None:
    """Check that each layer can be replaced alone, between dense ones.

    Raises:
        SettingError: where ``keep`` is searched for, or blocks may be narrowed.
    """
    if searched:
        raise SettingError(
            "measure_layers=True puts back the dense layers of a point, which are others where "
            "keep='auto' goes back; leave it out, or give keep as a number"
        )
    if narrow_blocks:
        raise SettingError(
            "measure_layers=True puts dense layers back one by one, which do not fit between "
            "those of a narrowed block; leave it or narrow_blocks out"
        )
