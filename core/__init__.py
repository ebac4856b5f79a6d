"""The engine: config, planner, sharding, checkpoints, and the rank's telemetry source."""
