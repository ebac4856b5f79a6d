"""The Textual apps: the setup wizard and the live dashboard. Never imports torch.

Way in: `setup.app.run_wizard`, `monitor.app.run_dashboard`. `client` is the watcher's side of the daemon, `format`
writes numbers as people read them, for everything that prints. Must not know launchers or the daemon's code: it
speaks gRPC and core's torch-free rooms.
"""
