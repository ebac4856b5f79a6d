"""What became of DeepSpeed's keys that are no setting of ours, and why."""

from __future__ import annotations

from distui.core.config.imports.carried import Kind

_UNITS = "units are the model's own repeated blocks, so there is no bucket to size"
_ALWAYS = "it is always so"
_WATCH = "always recorded: see `distui monitor`"
_TRACKER = 'engine.init_trackers(log_with="{}") in the script'
_ABSENT = "not offered"
_BY_FACE = "`distui launch --as deepspeed` obeys it from this file"

REMARKS: dict[str, tuple[Kind, str]] = {
    **{
        f"zero_optimization.{name}": ("needless", _UNITS)
        for name in (
            "reduce_bucket_size",
            "allgather_bucket_size",
            "sub_group_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_module_granularity_threshold",
            "prefetch_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "leaf_module",
        )
    },
    **{
        f"zero_optimization.{name}": ("needless", _ALWAYS)
        for name in (
            "contiguous_gradients",
            "overlap_comm",
            "reduce_scatter",
            "allgather_partitions",
            "round_robin_gradients",
            "load_from_fp32_weights",
            "ignore_unused_parameters",
            "compute_grad_norm",
            "elastic_checkpoint",
            "memory_efficient_linear",
            "override_module_apply",
            "pipeline_loading_checkpoint",
            "stage3_allgather_sequential",
            "stage3_use_all_reduce_for_fetch_params",
            "parameter_alignment",
            "legacy_stage1",
        )
    },
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "needless",
        "engine.save_model writes whole weights",
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "needless",
        "engine.save_model writes whole weights",
    ),
    "zero_optimization.zero_hpz_partition_size": ("lost", f"a second copy of the weights inside a node: {_ABSENT}"),
    "zero_optimization.zero_quantized_nontrainable_weights": ("lost", _ABSENT),
    "zero_optimization.mics_hierarchical_params_gather": ("needless", "parameters are gathered in one hop"),
    "zero_optimization.zenflow": ("lost", _ABSENT),
    "zero_optimization.log_trace_cache_warnings": ("needless", "no trace is kept"),
    "zero_optimization.enable_sanity_checks": ("needless", _ALWAYS),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ("lost", _ABSENT),
    "zero_optimization.cpu_offload_use_pin_memory": ("needless", "host homes are pinned where there is a GPU"),
    **{
        f"zero_optimization.{home}.{name}": ("needless", "the engine sizes, pins and overlaps its buffers itself")
        for home in ("offload_optimizer", "offload_param")
        for name in (
            "buffer_count",
            "buffer_size",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "fast_init",
            "max_in_cpu",
            "cpuadam_cores_perc",
        )
    },
    "zero_optimization.offload_optimizer.ratio": ("lost", "all of a rank's optimizer states go to one home"),
    "zero_optimization.offload_optimizer.super_offload": ("lost", _ABSENT),
    "vocabulary_size": ("needless", "DeepSpeed only warns of sizes that its tensor cores do not like"),
    "checkpoint.use_node_local_storage": ("lost", "ranks write one checkpoint, into one folder"),
    "optimizer.params": ("script", "an option of the script's own optimizer"),
    "optimizer.legacy_fusion": ("needless", "any fused optimizer of torch is taken as it is"),
    "scheduler": ("script", "build it in the script; `distui launch --as deepspeed` builds it from this file"),
    **{
        f"fp16.{name}": (
            "lost",
            "the loss scale halves on each overflow and doubles after loss_scale_window good steps",
        )
        for name in ("hysteresis", "consecutive_hysteresis", "min_loss_scale")
    },
    "fp16.auto_cast": ("needless", "inputs are cast where they enter the model"),
    "fp16.fp16_master_weights_and_grads": ("lost", "masters are fp32"),
    **{
        f"{section}.{name}": ("lost", "gradients are accumulated in precision.reduce_dtype, masters are fp32")
        for section in ("bf16", "bfloat16")
        for name in ("check_grad_overflow", "check_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states")
    },
    **{
        f"{section}.immediate_grad_update": ("needless", "each micro-batch is added to the fp32 gradient, either way")
        for section in ("bf16", "bfloat16")
    },
    "amp": ("lost", "NVIDIA's apex is not used; set precision.dtype"),
    "torch_autocast": ("lost", "wrap the forward in engine.autocast()"),
    "zero_allow_untested_optimizer": ("needless", "every element-wise optimizer is taken, others are refused by name"),
    "zero_force_ds_cpu_optimizer": ("needless", "the script's own optimizer steps in host memory"),
    "activation_checkpointing": ("changed", "set activation_checkpointing.mode = full to recompute the model's blocks"),
    "steps_per_print": ("needless", "`distui launch --no-tui` prints a line now and then"),
    "wall_clock_breakdown": ("needless", _WATCH),
    "memory_breakdown": ("needless", _WATCH),
    "dump_state": ("needless", "`distui config show` prints every value with its origin"),
    "comms_logger": ("needless", _WATCH),
    "timers": ("needless", _WATCH),
    "flops_profiler": ("needless", "one table after the second step, of every module"),
    "tensorboard": ("script", _TRACKER.format("tensorboard")),
    "wandb": ("script", _TRACKER.format("wandb")),
    "comet": ("script", _TRACKER.format("comet_ml")),
    "csv_monitor": ("script", _TRACKER.format("csv")),
    "monitor_config": ("script", _TRACKER.format("jsonl")),
    "aio": ("needless", "queue depth and block size follow from the disk: see `distui doctor`"),
    "checkpoint": ("needless", "checkpoints are written in parallel, and load at any stage and number of ranks"),
    "data_types": ("lost", "set precision.dtype and precision.reduce_dtype"),
    "prescale_gradients": ("needless", "gradients are averaged in fp32 by default, where no prescaling is needed"),
    "gradient_predivide_factor": ("needless", "gradients are averaged in fp32 by default, where none is needed"),
    "gradient_allreduce_op": ("lost", "gradients are averaged"),
    "managed_gradient_accumulation": ("script", "engine.accumulate(model) in the script"),
    "sparse_gradients": ("lost", "sparse gradients are refused: use dense embeddings"),
    "disable_allgather": ("lost", _ABSENT),
    "disable_python_gc": ("script", "gc.disable() in the script"),
    "dataloader_drop_last": ("script", "DataLoader(drop_last=True) in the script"),
    "seq_parallel_communication_data_type": ("lost", _ABSENT),
    **{
        f"tensor_parallel.{name}": ("needless", "the model comes from the script, in the file's format")
        for name in ("dtype", "keep_module_on_host", "vocab_parallel_lm_head")
    },
    "tensor_parallel": ("lost", "the plan follows from the model's own modules"),
    "expert_parallel": ("lost", "set strategy.expert_parallel"),
    "pipeline.activation_checkpoint_interval": (
        "changed",
        "set activation_checkpointing.mode = full; `--as deepspeed` recomputes a PipelineModule's layers by it",
    ),
    **{
        f"pipeline.{name}": ("needless", "activations travel whole, and are recomputed in torch's non-reentrant way")
        for name in ("pipe_partitioned", "grad_partitioned", "use_reentrant")
    },
    "pipeline": ("lost", "set strategy.pipeline_parallel"),
    "sequence_parallel": ("lost", "set strategy.context_parallel"),
    "checkpoint_tag_validation": ("needless", _ALWAYS),
    "use_data_before_expert_parallelism": ("lost", _ABSENT),
    "compile": ("script", "torch.compile(block) in the script"),
    "log_level": ("needless", "`distui control RUN log-level LEVEL` changes it on a running job"),
    "data_parallel_group": ("lost", _ABSENT),
    "zero_init": ("lost", _ABSENT),
    **{
        f"elasticity.{name}": ("script", _BY_FACE)
        for name in (
            "enabled",
            "max_train_batch_size",
            "micro_batch_sizes",
            "min_gpus",
            "max_gpus",
            "min_time",
            "prefer_larger_batch",
            "ignore_non_elastic_batch_info",
            "version",
            "model_parallel_size",
            "num_gpus_per_node",
        )
    },
    **{
        f"curriculum_learning.{name}": ("script", _BY_FACE)
        for name in (
            "enabled",
            "curriculum_type",
            "min_difficulty",
            "max_difficulty",
            "schedule_type",
            "schedule_config.total_curriculum_step",
            "schedule_config.difficulty_step",
            "schedule_config.root_degree",
            "schedule_config.difficulty",
            "schedule_config.max_step",
        )
    },
    "data_efficiency.enabled": ("script", _BY_FACE),
    "data_efficiency.seed": ("needless", "it seeds DeepSpeed's sampler, which is refused"),
    "data_efficiency.data_sampling": ("lost", "order and sample the data in the script's own sampler"),
    "data_efficiency.data_routing.enabled": ("script", _BY_FACE),
    **{
        f"data_efficiency.data_routing.random_ltd.{name}": ("script", _BY_FACE)
        for name in (
            "enabled",
            "total_layer_num",
            "random_ltd_layer_num",
            "random_ltd_layer_id",
            "model_mask_name",
            "model_type",
            "hidden_state_order",
            "random_ltd_schedule.min_value",
            "random_ltd_schedule.max_value",
            "random_ltd_schedule.schedule_type",
            "random_ltd_schedule.schedule_config.require_steps",
            "random_ltd_schedule.schedule_config.seq_per_step",
            "layer_token_lr_schedule",
        )
    },
    **{
        name: ("lost", _ABSENT)
        for name in (
            "autotuning",
            "compression_training",
            "hybrid_engine",
            "progressive_layer_drop",
            "eigenvalue",
            "quantize_training",
            "sparse_attention",
            "weight_quantization",
            "nebula",
            "datastates",
            "data_states",
            "autoep",
        )
    },
}
"""By dotted key, or by a section whose keys all share the reason."""
