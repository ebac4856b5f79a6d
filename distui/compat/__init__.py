"""The faces of other trainers (Accelerate, DeepSpeed), so that existing scripts run."""
