"""A run after the fact: one page, its telemetry as tables, or a recording that the dashboard plays.

Way in: `page.html_page`, `tables.write_tables`, `replay.Replay`, all on what `data.read_report` finds in the run's
folder. Must not need a daemon, nor the network.
"""
