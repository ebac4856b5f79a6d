"""What holds for every test: where kernels run, and that no property of Hypothesis is held to a time."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Under Triton's interpreter; it must be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("distui", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distui")
