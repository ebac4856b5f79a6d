"""The node agent: takes in telemetry, keeps runs on disk, diagnoses, serves watchers. Never imports torch.

Way in: `python -m distui.daemon`, which runs `serve`. `runs` is what is known and kept, `diagnosis` what is wrong,
`node` this machine. Others read runs through `runs` without a daemon. Must not know launchers, screens or engines: it
hears of a job only what its ranks and launcher tell, and what the kernel says of their processes.
"""
