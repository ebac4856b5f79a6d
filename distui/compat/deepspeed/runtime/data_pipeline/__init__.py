"""`deepspeed.runtime.data_pipeline`: curricula by difficulty, and tokens left out of layers.

Way in: `curriculum_scheduler`, `data_routing`. Sampling by DeepSpeed's analysed metrics (`data_sampling`) is refused.
"""
