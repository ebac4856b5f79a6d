"""The planner: memory and throughput of every strategy before anything runs. Torch-free and instant.

Way in: `models.load_model` gives a model's shapes, `search.plan_all` every strategy for them, ranked, from `memory`,
`time`, `reasons` and `advice`; `explain.explain` gives each number's formula and source, and `planned.planned_memory`
what one configuration should need. Knows the engine by its formulas only: it must not import what it predicts.
"""
