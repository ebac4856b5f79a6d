"""What of Accelerate's Megatron-LM the engine does too: the axes, sharded states, clipping, recomputation."""

from __future__ import annotations

from typing import Any

import torch

from distui.compat.accelerate.refusals import NotOffered, offered
from distui.compat.accelerate.utils.operations import gather, reduce

_AXES = {
    "tp_degree": "tensor_parallel",
    "pp_degree": "pipeline_parallel",
    "context_parallel_size": "context_parallel",
    "expert_model_parallel_size": "expert_parallel",
}
"""Fields that are sizes of axes -> the engine's settings."""
_SAY_NOTHING = (
    "decoder_last_pipeline_num_layers recompute_method recompute_num_layers attention_backend attention_dropout "
    "hidden_dropout attention_softmax_in_fp32 calculate_per_token_loss use_rotary_position_embeddings "
    "pipeline_model_parallel_split_rank num_layers_per_virtual_pipeline_stage train_iters train_samples "
    "start_weight_decay end_weight_decay lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples "
    "lr_warmup_fraction consumed_samples no_wd_decay_cond scale_lr_cond seq_length encoder_seq_length "
    "decoder_seq_length tensorboard_dir custom_train_step_class custom_train_step_kwargs "
    "custom_model_provider_function custom_prepare_model_function custom_megatron_datasets_provider_function "
    "custom_get_batch_function custom_loss_function other_megatron_args "
)
_OFF = (
    "megatron_dataset_flag set_all_logging_options return_logits no_load_optim no_save_optim eod_mask_loss "
    "use_precision_aware_optimizer sequence_parallelism "
)
_OTHERS: dict[str, Any] = {
    "weight_decay_incr_style": "constant",
    "lr_decay_style": "linear",
    "min_lr": 0,
    "lr_mult": 1.0,
    "eval_iters": 100,
    "eval_interval": 1000,
    "is_train_batch_min": True,
    "expert_tensor_parallel_size": 1,
    **dict.fromkeys(_OFF.split(), False),
    **dict.fromkeys(_SAY_NOTHING.split()),
}
"""Fields that are Megatron's own, with what says nothing."""
_WAYS = {
    "sequence_parallelism": "leave it out: it divides activations between tensor-parallel ranks",
}


class MegatronLMPlugin:
    """What of Megatron-LM's settings the engine does, on the script's own model; all others are refused by name."""

    def __init__(
        self,
        tp_degree: int | None = None,
        pp_degree: int | None = None,
        *,
        gradient_clipping: float | None = None,
        recompute_activations: bool | None = None,
        recompute_granularity: str | None = None,
        use_distributed_optimizer: bool | None = None,
        use_custom_fsdp: bool | None = None,
        num_micro_batches: int | None = None,
        context_parallel_size: int | None = None,
        expert_model_parallel_size: int | None = None,
        optimizer_cpu_offload: bool | None = None,
        overlap_cpu_optimizer_d2h_h2d: bool | None = None,
        **others: Any,
    ) -> None:
        """Raises: NotOffered for what would change the training and is not done; TypeError for no field."""
        self.context_parallel_size = context_parallel_size or 1
        self.expert_model_parallel_size = expert_model_parallel_size or 1
        self.num_micro_batches = num_micro_batches or 1
        self.gradient_clipping = 1.0 if gradient_clipping is None else gradient_clipping
        self.recompute_activations, self.recompute_granularity = recompute_activations, recompute_granularity
        self.use_distributed_optimizer, self.use_custom_fsdp = use_distributed_optimizer, use_custom_fsdp
        self.optimizer_cpu_offload = optimizer_cpu_offload
        self.overlap_cpu_optimizer_d2h_h2d = overlap_cpu_optimizer_d2h_h2d  # the engine's copies overlap anyway
        self.tp_degree, self.pp_degree = tp_degree or 1, pp_degree or 1
        for name, value in others.items():
            if name not in _OTHERS:
                raise TypeError(f"MegatronLMPlugin has no field {name!r}")
            if value is not None and value != (without := _OTHERS[name]):
                raise NotOffered(
                    f"MegatronLMPlugin({name}={value!r}) is not offered by distui",
                    "it is a setting of Megatron-LM's own models, data and schedule, which are not there",
                    _WAYS.get(name, f"leave it at {without}, and let the script's own model and loop do it"),
                )
        self._check_axes()
        if recompute_granularity not in (None, "full", "selective"):
            raise ValueError(f"recompute_granularity={recompute_granularity!r}: full or selective")

    def _axes(self) -> dict[str, Any]:
        return {ours: size for theirs, ours in _AXES.items() if (size := getattr(self, theirs)) > 1}

    def _check_axes(self) -> None:
        if self.num_micro_batches > 1 and self.pp_degree == 1:
            raise NotOffered(
                f"MegatronLMPlugin(num_micro_batches={self.num_micro_batches}) with pp_degree=1",
                "the model is called once a batch, and without a pipeline nothing cuts that into micro-batches",
                "pass Accelerator(gradient_accumulation_steps=N), and call accelerator.accumulate(model) in the loop",
            )

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the configuration that this asks for."""
        found: dict[str, dict[str, Any]] = {"optimizer": {"max_grad_norm": float(self.gradient_clipping)}}
        found["strategy"] = dict(self._axes())
        if self.use_custom_fsdp or self.use_distributed_optimizer:
            found["strategy"]["zero_stage"] = 3 if self.use_custom_fsdp else 1
        if self.recompute_activations:
            found["activation_checkpointing"] = {"mode": self.recompute_granularity or "selective"}
        if self.optimizer_cpu_offload:
            found["offload"] = {"optimizer": "cpu"}
        return found


def avg_losses_across_data_parallel_group(losses: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean of each loss over the ranks. Collective. Shapes: [losses]."""
    averaged: torch.Tensor = reduce(torch.cat([loss.detach().clone().view(1) for loss in losses]), "mean")
    return averaged


def gather_across_data_parallel_groups(tensor: Any) -> Any:
    """Return every rank's tensors, joined along their first dimension. Collective."""
    return gather(tensor)


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.megatron_lm", {}, name)
