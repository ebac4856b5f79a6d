"""Other machines: a job on many hosts, and how a daemon elsewhere is named and reached.

Way in: `supervisor` (as `python -m`) holds a job on many hosts: `starters/` reach them, `control` is the port that
their agents dial, `hello` compares what they have, `gang` knows who is there, `verdict` what was first to fail.
`remote.remote_options` is for a command's options, `remote.remote_and_run` for what was typed. Must not know what a
rank does, nor what is asked of a daemon.
"""
