"""Checkpoints in the host memory of a job's agents, each with a copy at the agent of the next host.

Way in: `keeper.Keeper` for the ranks of one host, `copies.HostMemory` for an agent among others, `shelves.Shelves` for
the supervisor, who knows which save is whole. None of them knows what is in a save.
"""
