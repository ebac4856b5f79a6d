"""Who a process is among the ranks, and what it does with them and its device.

Way in: `process.ProcessState` (rank, device, waiting for each other), `ops` (gather, reduce, pad of any nested
structure), `precision` (casts at a model's border, fp16's loss scale), `streams` (what orders the host and a GPU),
`host_memory` (pages, pinned or not). Knows no model, no optimizer and no settings.
"""
