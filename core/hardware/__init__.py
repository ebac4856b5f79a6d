"""What there is: GPUs, processors, memory, disks and network, as facts. Torch-free.

Way in: `detect.detect` looks at this machine, `detect.parse_hardware` reads a name such as `8xA100-40GB`; `types` are
the facts. A fact that cannot be had is absent, never 0. Knows nothing of settings, models or plans.
"""
