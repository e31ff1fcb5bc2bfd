"""FSDP2: gather sharded layers one at a time, replace them, and shard them again.

Only this module uses internals of torch's ``fully_shard``. The units that the user's
``configure_model`` has made stay: what replaces a layer belongs to the layer's unit, and is
gathered and resharded with it, as if it had been there from the start.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.distributed import Processes, checksums, local_rows
from lrcompress.errors import PlatformError

T = TypeVar("T")
# A parameter's identity -> the parameter group of its unit, and what manages it there.
FSDPParams = Mapping[int, tuple[Any, Any]]


@dataclass(frozen=True)
class ShardedProcesses(Processes):
    """Processes that each hold some rows of every parameter.

    A layer is gathered by all and worked on by its owner. While layers are solved no process
    holds more than two full weights; while they are replaced, one with its optimizer state, or the
    two or three of a feed-forward block that is narrowed.
    """

    sharded: ClassVar[bool] = True

    @override
    def reshard(self, model: nn.Module) -> None:
        reshard(model)

    @override
    @contextmanager
    def gathered(self, model: nn.Module, name: str) -> Iterator[None]:
        self.reshard(model)
        held = list(_sharded_in(model.get_submodule(name)))
        try:
            for module, key, parameter in held:
                module._parameters[key] = _full_parameter(parameter)
            yield
        finally:
            for module, key, parameter in held:
                module._parameters[key] = parameter  # type: ignore[assignment]

    @override
    @contextmanager
    def unsharded(
        self, model: nn.Module, names: Sequence[str], optimizers: Sequence[Optimizer] = ()
    ) -> Iterator[None]:
        """Hold full layers inside the block.

        Raises:
            PlatformError: if at its end they are not the same in all processes.
        """
        self.reshard(model)
        opened = {name: _UnshardedLayer(model.get_submodule(name), optimizers) for name in names}
        try:
            for one in opened.values():
                one.unshard_(_fsdp_params(model))
            yield
            now = {
                n: p for name in names for n, p in model.get_submodule(name).named_parameters(name)
            }
            found = self.first_difference(checksums(now))
        finally:
            for name, one in opened.items():
                one.reshard_(model.get_submodule(name), name)
        if found is not None:
            raise PlatformError(
                f"{found[0]!r} was not the same in all {self.size} processes when it was to be "
                "sharded again; something has changed it in one of them only"
            )

    @override
    def sum_rows_(self, parts: Tensor) -> None:
        self.all_reduce_(parts)


class _UnshardedLayer:
    """One layer that is unsharded while it is worked on."""

    def __init__(self, layer: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.layer, self.optimizers = layer, optimizers
        self.group: Any = None
        self.policy: Any = None
        self.place = 0
        self.parts: list[tuple[nn.Module, str, DTensor]] = []

    def unshard_(self, owners: FSDPParams) -> None:
        for module, key, parameter in list(_sharded_in(self.layer)):
            group, manager = owners[id(parameter)]
            if self.group is None:
                self.group, self.place = group, group.fsdp_params.index(manager)
            self.policy = self.policy or manager.mp_policy
            group.fsdp_params.remove(manager)
            manager._post_load_hook_handle.remove()  # which would keep the old layer alive
            self.parts.append((module, key, parameter))
            made = module._parameters[key] = _full_parameter(parameter)
            _swap_parameter_(self.optimizers, parameter, made, full_tensor)

    def reshard_(self, layer: nn.Module, name: str) -> None:
        """Shard the layer that is there now, and its optimizer state."""
        if self.group is None:
            return
        made = []
        for path, module in layer.named_modules(prefix=name):
            for key, whole in list(module._parameters.items()):
                if whole is None or isinstance(whole, DTensor):
                    continue
                manager = _make_fsdp_param(self.group, self.policy, module, key, whole)
                manager._param_fqn = f"{path}.{key}"
                made.append(manager)
                sharded = _state_sharder(manager)
                _swap_parameter_(self.optimizers, whole, manager.sharded_param, sharded)
            module._is_fsdp_managed_module = True
            module._fsdp_use_orig_params = True
        staying = set(layer.modules())
        for module, key, parameter in self.parts:
            if module not in staying:  # whoever still holds it does not hold it whole
                module._parameters[key] = parameter  # type: ignore[assignment]
        if made:
            self.group.fsdp_params[self.place : self.place] = made
            _renew(self.group)


def _sharded_in(
    layer: nn.Module, *, recurse: bool = True
) -> Iterator[tuple[nn.Module, str, DTensor]]:
    for module in layer.modules() if recurse else [layer]:
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                yield module, key, parameter


@torch.no_grad()
def full_tensor(value: T) -> T:
    """Return the full tensor of a sharded one; a collective call."""
    return value.full_tensor() if isinstance(value, DTensor) else value  # type: ignore[return-value]


def _full_parameter(parameter: DTensor) -> nn.Parameter:
    return nn.Parameter(full_tensor(parameter.detach()), requires_grad=parameter.requires_grad)


def _state_sharder(manager: Any) -> Callable[[object], object]:
    """Return a function that shards optimizer state of a parameter's shape as the parameter is."""
    parameter = manager.sharded_param

    @torch.no_grad()
    def sharded(value: object) -> object:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
            return value
        return sharded_like(parameter, value)

    return sharded


@torch.no_grad()
def sharded_like(parameter: DTensor, whole: Tensor) -> DTensor:
    """Return a tensor that every process has in full, sharded as ``parameter`` is."""
    local, rows = local_rows(parameter)
    device = local.device if local.device.type != "meta" else parameter.device_mesh.device_type
    return DTensor.from_local(
        whole[rows].to(device, copy=True),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=whole.shape,
        stride=parameter.stride(),
    )


def _swap_parameter_(
    optimizers: Iterable[Optimizer],
    old: Tensor,
    new: Tensor,
    turned: Callable[[object], object],
) -> None:
    """Replace ``old`` by ``new`` in every optimizer, with its state converted by ``turned``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {key: turned(state[key]) for key in list(state)}


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has sharded any part of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Reshard all units: free the parameters that a forward pass has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# A second model beside a sharded one


@contextmanager
def deepcopy_allowed(model: nn.Module) -> Iterator[dict[int, Any]]:
    """Allow a deep copy of a sharded model inside the block.

    The copy has plain classes, no units, and parameters of full shape on the meta device.

    Yields:
        The memo to copy with.
    """
    reshard(model)
    kinds = {m: type(m) for m in model.modules() if isinstance(m, FSDPModule)}
    aside = [(m, key) for m in kinds for key in (STATE_KEY, REGISTRY_KEY) if key in vars(m)]
    held = [(module, key, vars(module).pop(key)) for module, key in aside]
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo |= {
            id(value): value for value in vars(module).values() if isinstance(value, DeviceMesh)
        }
    for _, _, parameter in _sharded_in(model):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(whole, requires_grad=False)
    try:
        for module, kind in kinds.items():
            module.__class__ = kind.__bases__[1]
        yield memo
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind
        for module, key, value in held:
            vars(module)[key] = value


@torch.no_grad()
def shard_like_(made: nn.Module, model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Shard a copy made under :func:`deepcopy_allowed` in the units of ``model``, and fill it.

    Args:
        made: the copy, with factored layers as they are in ``values``.
        model: the sharded one.
        values: by name: in full, the same in all processes, or sharded as the model is.

    Returns:
        ``made``.

    Raises:
        PlatformError: if this torch keeps units of FSDP2 in another way.
    """
    _shard_in_units(made, model)
    filled: dict[int, nn.Parameter] = {}  # a tied one once
    for name, module in made.named_modules():
        for _, key, parameter in list(_sharded_in(module, recurse=False)):
            if id(parameter) not in filled:
                value = values[f"{name}.{key}".lstrip(".")].detach()
                same = isinstance(value, DTensor)
                local = value.clone() if same else sharded_like(parameter, value)
                filled[id(parameter)] = nn.Parameter(local, requires_grad=False)
            module._parameters[key] = filled[id(parameter)]
    for name, rest in (*made.named_buffers(), *made.named_parameters()):
        if not isinstance(rest, DTensor) and name in values:
            rest.copy_(values[name])
    return made


def _shard_in_units(made: nn.Module, model: nn.Module) -> None:
    mesh = next(_param_groups(model)).mesh_info.mesh
    names = {module: name for name, module in model.named_modules()}
    for module in reversed(list(names)):  # what is inside first
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        if state is not None and module is state._modules[0]:
            unit = [made.get_submodule(names[one]) for one in state._modules]
            fully_shard(unit, mesh=mesh, mp_policy=state._mp_policy, reshard_after_forward=True)


# State of fully_shard


def _param_groups(model: nn.Module) -> Iterator[Any]:
    """Yield the parameter groups of all units, each once.

    Raises:
        PlatformError: if this torch keeps them in another way.
    """
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
        if groups is None:
            raise PlatformError(
                f"torch {torch.__version__} keeps the units of FSDP2 otherwise than torch 2.13, "
                "which this was made for; use strategy='ddp', or another torch"
            )
        yield from (group for group in groups if id(group) not in seen)
        seen |= {id(group) for group in groups}


def _fsdp_params(model: nn.Module) -> FSDPParams:
    return {
        id(m.sharded_param): (group, m) for group in _param_groups(model) for m in group.fsdp_params
    }


def _make_fsdp_param(group: Any, policy: Any, module: nn.Module, key: str, whole: Tensor) -> Any:
    """Shard a parameter in place, as one of a unit."""
    return FSDPParam(
        whole,  # type: ignore[arg-type]
        ParamModuleInfo(module, key),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        policy,
        group.offload_policy,
    )


def _renew(group: Any) -> None:
    """Let a unit work out anew what follows from its parameters and the modules that hold them.

    Its data types, the order in which gradients are reduced (torch 2.15 on), and the state-dict
    hooks, which reshard it.
    """
    every = (
        group._module_to_pre_save_state_dict_hook_handle,
        group._module_to_pre_load_state_dict_hook_handle,
    )
    for handles in every:
        for handle in handles.values():
            handle.remove()
        handles.clear()
    if group._reset_sharded_params:
        group.lazy_init()


# Checks


def check_layers(model: nn.Module, names: Iterable[str], processes: Processes, owner: str) -> None:
    """Check that layers are sharded in a way in which they can be replaced.

    Raises:
        PlatformError: if one is not; the message says what to do.
    """
    owners = _fsdp_params(model)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, FSDPModule):
            raise PlatformError(
                f"layer {name!r} is a unit of its own, and {owner} replaces layers within a unit; "
                "give the module that holds it to fully_shard instead, or leave it out with "
                "exclude="
            )
        for parameter in layer.parameters():
            group, manager = owners.get(id(parameter), (None, None))
            reason = _reason(parameter, group, manager, processes)
            if reason is not None:
                raise PlatformError(f"layer {name!r} {reason}")


def _reason(parameter: Tensor, group: Any, manager: Any, processes: Processes) -> str | None:
    if manager is None or not isinstance(parameter, DTensor):
        return (
            "is not sharded, and no one would keep it the same in all processes; give a module "
            "that holds it to fully_shard in configure_model"
        )
    mesh = parameter.device_mesh
    if tuple(parameter.placements) != (Shard(0),) or mesh.size() != processes.size:
        return (
            f"lies over {mesh.size()} of {processes.size} processes as "
            f"{tuple(parameter.placements)}; only rows over all of them can be followed: "
            "fully_shard(..., mesh=self.device_mesh['data_parallel'])"
        )
    if manager._module_info.shared_modules:
        return "shares its weight with another module, which sharding cannot untie; exclude= it"
    if isinstance(group.offload_policy, CPUOffloadPolicy):
        return "is offloaded to the CPU, which cannot be followed; leave offload_policy out"
    return None


def check_units(model: nn.Module) -> None:
    """Check that units hold the parameters of the model, and no others.

    Raises:
        PlatformError: naming a parameter for which that is not so.
    """
    owners = _fsdp_params(model)
    names = {id(p): name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    lost = [names[key] for key in names if key not in owners]
    stale = [str(owners[key][1]._param_fqn) for key in owners if key not in names]
    for name in (*lost, *stale):
        raise PlatformError(
            f"parameter {name!r} is not the one that its unit of FSDP2 gathers; something has "
            "replaced a layer without its unit"
        )
