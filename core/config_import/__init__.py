"""Reads the configurations of other tools: a DeepSpeed JSON, an Accelerate YAML."""
