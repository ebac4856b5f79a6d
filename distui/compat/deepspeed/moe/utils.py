"""`deepspeed.moe.utils`: which parameters are experts', and groups of an optimizer that hold them apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distui.compat.deepspeed.moe.layer import MoE

Group = dict[str, Any]


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Tell whether a model has mixtures, and how many experts the first one has."""
    found = next((module for module in m.modules() if isinstance(module, MoE)), None)
    return found is not None, 0 if found is None else found.num_experts


def is_moe_param(param: torch.Tensor) -> bool:
    """Tell whether a parameter is an expert's."""
    return not getattr(param, "allreduce", True)


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what is no expert's, and what is."""
    params = list(params)
    return [one for one in params if not is_moe_param(one)], [one for one in params if is_moe_param(one)]


def is_moe_param_group(param_group: Group) -> bool:
    """Tell whether a group of an optimizer is of experts."""
    return bool(param_group.get("moe", False))


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Group | tuple[Group, ...] | list[Group], max_group_size: float | None = 178956971
) -> list[Group]:
    """Return the groups without experts' parameters, and behind them groups of these, with `moe` set.

    Each has the options of the group that its parameters were in, the name of the ranks that share them, and
    `max_group_size` elements at most, a parameter at least.
    """
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    if not isinstance(param_groups, (list, tuple)):
        raise ValueError(f"Unknown param group type of {type(param_groups)}")
    groups = param_groups if isinstance(param_groups, list) else list(param_groups)
    names = {param.group_name for group in groups for param in group["params"] if is_moe_param(param)}
    found: list[Group] = []
    for group in groups:
        shared, experts = split_params_into_shared_and_expert_params(group["params"])
        for name in sorted(names):
            of_name = [param for param in experts if param.group_name == name]  # type: ignore[attr-defined]
            for part in _parts(of_name, max_group_size):
                found.append({**group, "name": name, "moe": True, "params": part})
        group["params"] = shared
    groups += found
    return groups


def _parts(params: list[nn.Parameter], most: float | None) -> list[list[nn.Parameter]]:
    if most is None:
        return [params]
    parts: list[list[nn.Parameter]] = []
    size = 0
    for param in params:
        if not parts or size + param.numel() > most:
            parts.append([])
            size = 0
        parts[-1].append(param)
        size += param.numel()
    return parts


def configure_moe_param_groups(model_parameters: list[Any]) -> list[Group]:
    """Return groups with experts apart, of parameters or of groups."""
    assert isinstance(model_parameters, list), "model_parameters must be a list"
    for param in model_parameters:
        if not isinstance(param, (torch.Tensor, dict)):
            raise TypeError(
                "param argument that would be given to the optimizer should be an iterable of Tensors or dicts, but "
                f"got {type(param)}"
            )
    if isinstance(model_parameters[0], nn.Parameter):
        return split_params_into_different_moe_groups_for_optimizer(
            {"params": model_parameters, "name": "dense-params"}
        )
    if not any("moe" in group for group in model_parameters):
        return split_params_into_different_moe_groups_for_optimizer(model_parameters)
    return model_parameters
