"""The views of the dashboard, one a module.

Way in: `base.View`; `monitor/app.py` lists the views in the order of their number keys. Each draws the `base.Frame`
that it is given and keeps nothing of the run. Must not talk to the daemon, but for
`logs`, whose text is read as it is scrolled.
"""
