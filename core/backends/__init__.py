"""The engines that a training script can run on, one protocol for all."""
