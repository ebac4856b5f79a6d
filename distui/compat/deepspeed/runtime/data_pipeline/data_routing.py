"""Random layer-wise token dropping: in training, layers in the middle see a random part of the tokens.

Source: Yao et al., "Random-LTD" (arXiv 2211.11586), with DeepSpeed's schedule and its draws. Layers stay what and where
they are: two hooks take the part and put it back, so names in checkpoints do not change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distui.compat.deepspeed.runtime.data_pipeline.curriculum_scheduler import rooted
from distui.compat.not_offered import NotOffered, refused_name
from distui.core.errors import ConfigError, Problem, UserError

SECTION = "data_efficiency.data_routing.random_ltd"
_MARK = "_may_drop_tokens"
_KEYS = {
    "total_layer_num": None,
    "random_ltd_layer_num": None,
    "random_ltd_layer_id": None,
    "model_type": ("encoder", "decoder"),
    "hidden_state_order": ("batch_seq_dim", "seq_batch_dim"),
    "random_ltd_schedule": None,
}

RandomLayerTokenDrop = refused_name(
    "deepspeed", "RandomLayerTokenDrop", "convert_to_random_ltd(engine, LayerClass) marks the layers themselves"
)


def missing(key: str, why: str) -> ConfigError:
    """Return the error of a key that must be there."""
    return ConfigError([Problem(key, "is missing", why, f"set {key}")])


class RandomLTDScheduler:
    """Says how many tokens the layers see at each step."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the section, with `global_batch_size`. Raises: ConfigError, NotOffered."""
        problems = []
        for key, known in _KEYS.items():
            if key not in config:
                problems.append(Problem(f"{SECTION}.{key}", "is missing", "layers are chosen by it", f"set {key}"))
            elif known is not None and config[key] not in known:
                takes = " or ".join(known)
                problems.append(Problem(f"{SECTION}.{key}", f"{config[key]!r} is unknown", takes, f"write {takes}"))
        schedule = config.get("random_ltd_schedule") or {}
        details = schedule.get("schedule_config") or {}
        needed = [key for key in ("min_value", "max_value", "schedule_type") if key not in schedule]
        needed += [f"schedule_config.{key}" for key in ("require_steps", "seq_per_step") if key not in details]
        where = f"{SECTION}.random_ltd_schedule"
        problems += [
            Problem(f"{where}.{key}", "is missing", "numbers of tokens follow from it", f"set {key}") for key in needed
        ]
        if not needed and schedule["schedule_type"] != "fixed_linear":
            what = f"{schedule['schedule_type']!r} is unknown"
            problems.append(Problem(f"{where}.schedule_type", what, "DeepSpeed has one", "write fixed_linear"))
        if problems:
            raise ConfigError(problems)
        if (config.get("layer_token_lr_schedule") or {}).get("enabled"):
            raise NotOffered(
                "random-LTD's layer_token_lr_schedule is not offered by distui",
                "DeepSpeed refuses it too",
                "leave it out",
            )
        self.model_layer_num, self.random_ltd_layer_num = config["total_layer_num"], config["random_ltd_layer_num"]
        self.global_batch_size = config["global_batch_size"]
        self._schedule, self._details = schedule, details
        self.state: dict[str, Any] = {}
        self.reset_to_init()

    def reset_to_init(self) -> None:
        """Begin again."""
        least, most = self._schedule["min_value"], self._schedule["max_value"]
        self.state = {"min_value": least, "max_value": most, "current_value": least}
        self.state |= {"consumed_layer_tokens": 0, "current_steps": -1}

    def get_current_seq(self) -> int:
        """Return how many tokens of each sequence the layers see now."""
        return int(self.state["current_value"])

    def set_current_seq(self, seq_length: int) -> None:
        """Set how many tokens the layers see."""
        self.state["current_value"] = seq_length

    def get_random_ltd_layer_num(self) -> int:
        """Return how many layers see a part."""
        return int(self.random_ltd_layer_num)

    def get_state(self) -> dict[str, Any]:
        """Return where the schedule is."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with what `get_state` returned."""
        self.state = state

    def get_value(self, global_steps: int) -> int:
        """Return how many tokens the layers see at a step; the first is step 0."""
        least, most = self.state["min_value"], self.state["max_value"]
        return rooted(global_steps, self._details["require_steps"], 1, least, most, self._details["seq_per_step"])

    def update_seq(self, global_steps: int) -> None:
        """Go to a step, and count the tokens that all layers together see in it."""
        state = self.state
        if state["current_value"] < state["max_value"]:
            state["current_value"] = self.get_value(global_steps)
        if global_steps != state["current_steps"]:
            whole = self.model_layer_num - self.random_ltd_layer_num
            tokens = state["current_value"] * self.random_ltd_layer_num + state["max_value"] * whole
            state["consumed_layer_tokens"] += self.global_batch_size * tokens
            state["current_steps"] = global_steps

    def get_total_layer_tokens(self, train_iters: int) -> int:
        """Return the tokens that all layers together see in so many steps."""
        for step in range(train_iters):
            self.update_seq(step)
        return int(self.state["consumed_layer_tokens"])

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is, for a checkpoint."""
        return dict(self.state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where it was taken."""
        self.state.update({key: state_dict[key] for key in self.state})


class _Drops:
    """What the marked layers of one model share: the draws of a forward."""

    def __init__(self, scheduler: RandomLTDScheduler, config: Mapping[str, Any], num_layers: int) -> None:
        self._scheduler, self._num_layers = scheduler, num_layers
        self._mask_name = config.get("model_mask_name")
        self._is_encoder = config["model_type"] == "encoder"
        self._batch_first = config["hidden_state_order"] == "batch_seq_dim"
        self._drawn: torch.Tensor | None = None
        """[layers, batch, kept], ascending in each row."""
        self._whole: dict[int, torch.Tensor] = {}

    def attach(self, layer: nn.Module, index: int) -> None:
        """Let `layer`, the `index`-th of those that drop, see a part of its tokens in training."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._whole.pop(index, None)  # of a forward that ended early
            return self._take(index, args, kwargs) if module.training else None

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self._put_back(index, output) if index in self._whole else None

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True)

    def _index(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        assert self._drawn is not None
        kept = self._drawn[index] if self._batch_first else self._drawn[index].T
        return kept.unsqueeze(-1).expand(*kept.shape, hidden.size(-1))

    @property
    def _dim(self) -> int:
        return 1 if self._batch_first else 0

    def _take(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], torch.Tensor):
            raise UserError(
                "random-LTD cannot take tokens from a layer's input",
                "its first positional argument is no tensor of hidden states",
                "call the layer as layer(hidden_states, ...)",
            )
        hidden = args[0]
        length, batch = hidden.size(self._dim), hidden.size(1 - self._dim)
        kept = self._scheduler.get_current_seq()
        if kept >= length:
            return None
        if index == 0:
            chances = torch.ones(self._num_layers * batch, length, device=hidden.device)
            drawn = torch.multinomial(chances, kept).view(self._num_layers, batch, kept)
            self._drawn = drawn.sort(dim=-1).values
        if self._drawn is None or self._drawn.shape[1:] != (batch, kept):
            raise UserError(
                "random-LTD's layers are not called in their order",
                f"layer {index} of {self._num_layers} came with {batch} sequences before the first drew for them",
                "call the layers in the order of random_ltd_layer_id, all with one batch",
            )
        if self._mask_name is not None:
            kwargs = {**kwargs, self._mask_name: self._part_of_mask(index, kwargs[self._mask_name])}
        self._whole[index] = hidden
        return (hidden.gather(self._dim, self._index(index, hidden)), *args[1:]), kwargs

    def _part_of_mask(self, index: int, mask: Any) -> Any:
        """Return the mask `[batch, heads or 1, queries, keys]` of the tokens that are kept."""
        assert self._drawn is not None
        kept = self._drawn[index]
        if not self._is_encoder:  # causal: the same for any tokens in their order
            return None if mask is None else mask[:, :, : kept.size(-1), : kept.size(-1)]
        rows = torch.arange(len(kept), device=kept.device)[:, None, None]
        return mask.expand(len(kept), *mask.shape[1:])[rows, :, kept[:, :, None], kept[:, None, :]].movedim(-1, 1)

    def _put_back(self, index: int, output: Any) -> Any:
        hidden = self._whole.pop(index)
        part = output[0] if isinstance(output, tuple) else output
        whole = hidden.scatter(self._dim, self._index(index, hidden), part.to(hidden.dtype))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def attach(model: nn.Module, scheduler: RandomLTDScheduler, config: Mapping[str, Any]) -> None:
    """Make the marked layers of `model` that the section names drop tokens.

    Raises: ConfigError where other layers are marked than it names.
    """
    wanted = sorted(config["random_ltd_layer_id"])
    found: list[nn.Module] = []
    for name, layer in model.named_modules():
        # As DeepSpeed does: the next number in the list, anywhere in the name.
        if getattr(layer, _MARK, False) and len(found) < len(wanted) and str(wanted[len(found)]) in name:
            found.append(layer)
    if len(found) != config["random_ltd_layer_num"]:
        counts = f"{config['random_ltd_layer_num']}, and {len(found)} layers fit random_ltd_layer_id {wanted}"
        fix = "list as many numbers of layers as drop tokens, and convert layers of that class"
        raise ConfigError([Problem(f"{SECTION}.random_ltd_layer_num", counts, "one number a layer", fix)])
    drops = _Drops(scheduler, config, len(found))
    for index, layer in enumerate(found):
        drops.attach(layer, index)


def convert_to_random_ltd(model: Any, convert_type: Any) -> Any:
    """Make the layers of class `convert_type` in an engine of `initialize` drop tokens; returns the engine."""
    for layer in model.module.modules():
        if isinstance(layer, convert_type):
            setattr(layer, _MARK, True)
    model.random_ltd_initialize()
    return model


def save_without_random_ltd(model: Any) -> dict[str, Any]:
    """Return the whole weights of an engine, or of a module; names never change. Collective for an engine."""
    return dict(model.module_state_dict() if hasattr(model, "module_state_dict") else model.state_dict())


def remove_random_ltd_state_dict(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a state with the names that layers have without DeepSpeed's wrapper."""
    return OrderedDict((key.replace(".random_ltd_layer", ""), value) for key, value in state_dict.items())


__path__: list[str] = []  # DeepSpeed's files in it can be imported by their own paths (refusals.ALIASES)
