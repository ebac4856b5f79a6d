"""A job as its launcher sees it: check, start, watch, keep its daemon alive, and tell its end.

Way in: `launch.launch`. `preflight` refuses what cannot run here, `job.Job` holds the agent's process, `plain` shows it
without a screen, `outcome` and `ending` say how it ended. Must not load torch, nor be needed by a job once it runs.
"""
