"""The node agent: takes in telemetry, keeps runs on disk, diagnoses, serves watchers; never imports torch."""
