"""`accelerate.parallelism_config`: where Accelerate keeps `ParallelismConfig`."""

from __future__ import annotations

from distui.compat.accelerate.utils.axes import ParallelismConfig as ParallelismConfig
