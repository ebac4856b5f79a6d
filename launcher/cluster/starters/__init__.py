"""The ways to start an agent on a host: each a file with a class that is a `Starter`.

Way in: `distui.launcher.cluster.starter.load_starter`. Must not know what an agent does, nor when it is started.
"""
