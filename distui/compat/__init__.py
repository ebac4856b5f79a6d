"""The faces of other trainers, so that existing scripts run: Accelerate's, DeepSpeed's, and what Trainer needs.

Way in: `accelerate`, `deepspeed`, `transformers`; `distui launch --as` puts them under a script's own imports
(`launcher/compat`). `not_offered` refuses what a face lacks where it is used, with the way around. Built on
`distui.Engine`; core must not know them.
"""
