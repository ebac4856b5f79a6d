"""`deepspeed.moe`: DeepSpeed's mixture of experts, whose experts over ranks are the engine's expert parallelism."""
