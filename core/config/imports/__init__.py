"""The configurations of DeepSpeed and Accelerate, read key by key into settings of ours.

Way in: `files.import_file`, which finds out whose a file is; `deepspeed.read` and `accelerate.read` take one that is
known, and `carried.Carried` is what each returns: values, and a word on every key that became none. Must not know what
runs on those settings: a key that would have no effect is told, never dropped.
"""
