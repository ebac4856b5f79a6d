"""Other machines: how a daemon elsewhere is named and reached.

Way in: `remote.remote_options` for a command's options, `remote.remote_and_run` for what was typed. Must not know what
is asked of the daemon.
"""
