"""The ways to start an agent on a host. Each is a file with a class that has what `starter.Starter` lists.

Way in: `starter.load_starter`. Must not know what an agent does, nor when it is started.
"""
