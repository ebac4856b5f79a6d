"""Where a script's metrics go beside the dashboard: files, TensorBoard, experiment services, or the script's own.

Way in: `trackers.open_trackers`. Runs on rank 0 alone, and knows neither the engine nor telemetry.
"""
