"""Measurements in processes of their own: a script's model on the meta device, collective bandwidth, what plans need.

Way in: `script_model.load_script_model`, `collectives.measure_collectives`, `calibrate.calibrate`; each starts the file
that measures (`model_probe`, `collectives_bench`, `calibrate_bench`), where alone torch is loaded. Must not know runs.
"""
