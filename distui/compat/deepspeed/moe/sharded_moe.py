"""`deepspeed.moe.sharded_moe`: gate and layer under the names of DeepSpeed's file."""

from distui.compat.deepspeed.moe.gating import TopKGate
from distui.compat.deepspeed.moe.layer import MOELayer

__all__ = ["MOELayer", "TopKGate"]
