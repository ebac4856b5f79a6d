"""What runs on each node of a job: the agent that starts the ranks, and the first code of each rank.

Way in: `agent.main` and `rank.main`, as `python -m`. `ranks` starts and ends the processes, `store` and `peers` are
where ranks and nodes meet. Must not know commands or screens.
"""
