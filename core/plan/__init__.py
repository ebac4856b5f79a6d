"""Predict memory and throughput of every strategy before anything runs. Torch-free.

load_model("llama-7b") -> ModelSpec          models.py, presets.py
plan_all(model, hardware) -> list[Plan]      search.py, from memory.py, time.py, reasons.py, advice.py
explain(plan, model, hardware) -> [Term]     explain.py
"""
