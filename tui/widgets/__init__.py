"""Widgets on Textual's Line API, fast enough for a thousand ranks and readable without colour.

Way in: one a module, such as `table.LineTable`, `chart.LineChart`, `heatmap.Heatmap`; `palette` has their colours. Must
not know runs, ranks' records or the daemon: they draw what they are given.
"""
