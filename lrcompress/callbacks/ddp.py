"""DDP: check that all processes agree, and rebuild the wrapper after a change of structure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lrcompress.callbacks import fsdp
from lrcompress.callbacks.compiled import keep_compiled
from lrcompress.callbacks.trainer_state import steps_done, uses_fsdp2
from lrcompress.distributed import ONE_PROCESS, Processes, checksums
from lrcompress.errors import PlatformError
from lrcompress.nn import Replacement

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DDP reads when it wraps


def processes_of(trainer: pl.Trainer) -> Processes:
    """Return the processes of a trainer: one alone, those of DDP, or those of FSDP2."""
    if uses_fsdp2(trainer):
        return fsdp.ShardedProcesses.of()
    return Processes.of() if trainer.world_size > 1 else ONE_PROCESS


def check_layers(module: nn.Module, names: Sequence[str], processes: Processes, owner: str) -> None:
    """Check that layers are sharded in a way in which they can be replaced.

    Raises:
        PlatformError: if one is not; the message says what to do.
    """
    if processes.sharded:
        fsdp.check_units(module)
        fsdp.check_layers(module, names, processes, owner)


def check_same_module(module: nn.Module, processes: Processes) -> None:
    """Check that all processes start from the same module.

    Raises:
        PlatformError: naming the first parameter that differs.
    """
    if processes.size == 1:
        return
    found = processes.first_difference(
        {
            name: f"{tuple(p.shape)} {'trained' if p.requires_grad else 'frozen'}"
            for name, p in module.named_parameters()
        }
    )
    if found is not None:
        raise PlatformError(
            f"parameter {found[0]!r} is not alike in all processes: {_each(found[1])}; build and "
            "freeze the same module in every one"
        )


def check_same_lengths(trainer: pl.Trainer, processes: Processes) -> None:
    """Check that all processes reach a point at the same step.

    Raises:
        PlatformError: if batches, epochs or steps differ; the message has those of each process.
    """
    if processes.size == 1:
        return
    found = processes.first_difference(
        {
            "batches": float(trainer.num_training_batches),
            "epochs": trainer.max_epochs,
            "steps so far": steps_done(trainer),
        }
    )
    if found is not None:
        raise PlatformError(
            f"training {found[0]} are not as many in all processes: {_each(found[1])}; they step "
            "together, so give each the same number, as DistributedSampler does, and the same "
            "checkpoint"
        )


def check_same_checkpoint(state: Mapping[str, Any], processes: Processes) -> None:
    """Check that all processes resume from the same checkpoint; nodes may have separate disks.

    Raises:
        PlatformError: if they do not; the message says what differs.
    """
    held = {"points that are done": state["stage"], "layers": str(state["plan"])}
    found = processes.first_difference(held | {"observed": state["observation"]["folded"]})
    if found is not None:
        raise PlatformError(
            f"the processes were given different checkpoints: {found[0]} {_each(found[1])}; keep "
            "checkpoints where all of them see the same files"
        )


def check_same_parameters(module: nn.Module, processes: Processes) -> None:
    """Check that parameters and structure are the same in all processes.

    Of a sharded parameter only the shape is compared; its values were compared when it was
    changed.

    Raises:
        PlatformError: naming the first parameter that differs.
    """
    if processes.sharded:
        processes.run_on_all(lambda: fsdp.check_units(module))
    if processes.size == 1:
        return
    ignored = set(getattr(module, _IGNORED, ()))
    tensors = dict(module.named_parameters()) | dict(_structure_buffers(module))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    sharded = {n: tuple(t.shape) for n, t in tensors.items() if hasattr(t, "full_tensor")}
    alike: dict[str, object] = dict(sharded)
    alike |= checksums({n: t for n, t in tensors.items() if n not in sharded})
    found = processes.first_difference(alike)
    if found is not None:
        name, sums = found
        same = [str(number) for number, one in enumerate(sums) if one == sums[0]]
        raise PlatformError(
            f"{name!r} is not the same in all {processes.size} processes: those like the first are "
            f"{', '.join(same)}; something has changed it in one of them only"
        )


def _each(values: Sequence[object]) -> str:
    return ", ".join(f"{value} in process {number}" for number, value in enumerate(values))


def _structure_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        if isinstance(child, Replacement):
            yield from child.named_buffers(prefix)


def sync_structure_(trainer: pl.Trainer, module: nn.Module, processes: Processes) -> None:
    """Check that a structure is new in all processes alike, and adapt DDP and Dynamo to it.

    Raises:
        PlatformError: naming the first parameter that differs between processes.
    """
    check_same_parameters(module, processes)
    rebuild_ddp_(trainer)
    keep_compiled(module)


def rebuild_ddp_(trainer: pl.Trainer) -> None:
    """Rebuild DDP's wrapper after a change of structure, with the strategy's own settings.

    The hooks of the old wrapper are removed. Gradients may be views of its buckets: they are
    dropped. Batch norms stay converted, as they are in the module itself.
    """
    strategy: Any = trainer.strategy
    wrapper = strategy.model
    if not isinstance(wrapper, DistributedDataParallel):
        return
    wrapper._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    del wrapper  # and its buckets, as large as the model, before others are allocated
    module = strategy.model = strategy.lightning_module
    for parameter in module.parameters():
        parameter.grad = None
    _reset_communication_hook(strategy._ddp_comm_state)
    strategy._pl_static_graph_delay_done = False
    ignored = getattr(module, _IGNORED, None)
    # indices and masks are the same everywhere; DDP would send them with every forward pass
    ours = [name for name, _ in _structure_buffers(module)]
    setattr(module, _IGNORED, [*(ignored or ()), *ours])
    try:
        strategy.configure_ddp()
    finally:
        if ignored is None:
            delattr(module, _IGNORED)
        else:
            setattr(module, _IGNORED, ignored)


def _reset_communication_hook(state: Any) -> None:
    """Reset a communication hook that keeps state, such as PowerSGD, for the new buckets."""
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        getattr(state, name, {}).clear()
    if hasattr(state, "error_dict"):
        state.iter = 0
