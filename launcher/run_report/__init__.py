"""A run on one page, and its telemetry as tables: what `distui report` writes."""
