"""The optimizer's state by name: which part of which parameter this rank holds, whatever the ZeRO stage.

DeepSpeed flattens parameters, pads them and cuts them into ranks, in another way at each stage. A fragment says where
one parameter's elements lie in that, so that what N ranks of one stage wrote, M ranks of another read, bit for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MASTER = "master"
"""The kind of the float32 weights themselves; the others are the optimizer's: `exp_avg`, `exp_avg_sq`, `step`."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of the flattened parameter `name`, which lie at `offset` of `flat`: the tensor
    that the optimizer steps, and whose shape its state has, too."""

    name: str
    start: int
    count: int
    flat: Tensor
    offset: int

    def part(self, tensor: Tensor) -> Tensor:
        """The fragment's view of `flat`, or of a state tensor of its shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def held(engine: Any) -> Iterator[Fragment]:
    """The fragments of trained parameters that this rank holds: all of them without ZeRO, its own share with it."""
    names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    for parameter, name in names.items():
        if stage == 0:
            yield Fragment(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.partition_numel() * zero._get_param_partition_rank(parameter)
            count = min(parameter.partition_numel(), parameter.ds_numel - start)  # the last ranks' end in padding
            if count > 0:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield Fragment(name, start, count, flat, offset)
        elif (mapping := parameter._hp_mapping) is not None:
            # DeepSpeed has another optimizer for bfloat16 at stage 1.
            flats = "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
            flat = next(getattr(zero, flat) for flat in flats if hasattr(zero, flat))[mapping.param_group_index]
            part = mapping.lp_fragment_address
            yield Fragment(name, part.start, part.numel, flat, mapping.hp_fragment_address.start)


def owned(engine: Any, rank: int, ranks: int) -> Iterator[Fragment]:
    """`held`, each element by one rank alone."""
    for number, fragment in enumerate(held(engine)):
        if engine.zero_optimization_stage() > 0 or number % ranks == rank:
            yield fragment


def shapes(engine: Any) -> dict[str, list[int]]:
    """Of every trained parameter, by name, whoever holds it."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def states(engine: Any, fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
    """(kind, values) of one fragment: its weights, and what the optimizer has of it since its first step."""
    yield MASTER, fragment.part(fragment.flat)
    for kind, value in _optimizer(engine).state.get(fragment.flat, {}).items():
        if isinstance(value, Tensor) and value.shape == fragment.flat.shape:
            yield kind, fragment.part(value)
        else:
            yield kind, torch.as_tensor(value).reshape(1)


@torch.no_grad()
def restore(engine: Any, read: Callable[[Fragment], dict[str, Tensor]]) -> None:
    """Put the state back that `read` has of each fragment (by kind, as `states` gave it), and make the weights that
    the model computes with from it. Every rank takes part. Works on an engine that has trained already, too."""
    optimizer, zero, stage = _optimizer(engine), engine.optimizer, engine.zero_optimization_stage()
    optimizer.state.clear()
    for fragment in held(engine):
        found = read(fragment)
        fragment.part(fragment.flat).copy_(found.pop(MASTER))
        state = optimizer.state[fragment.flat] if found else {}
        for kind, value in found.items():
            if kind == "step":
                state[kind] = _step(optimizer, value, fragment.flat)
            else:
                if kind not in state:
                    state[kind] = torch.zeros_like(fragment.flat, memory_format=torch.preserve_format)
                fragment.part(state[kind]).copy_(value)
    if stage == 3:
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
    elif stage > 0:
        zero.update_lp_params()
        zero._hp_optimizer_states_linked = False  # DeepSpeed's own views are of the state that was replaced


def _optimizer(engine: Any) -> Any:
    """The optimizer that steps the flat tensors, without ZeRO's around it."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() > 0 else engine.optimizer


def _step(optimizer: Any, value: Tensor, flat: Tensor) -> Any:
    """As the optimizer keeps it: torch's fused Adam beside the weights, its others on the CPU, DeepSpeed's a number."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(value)
    return value.reshape(()).to(flat.device if optimizer.defaults.get("fused") else "cpu", copy=True)
