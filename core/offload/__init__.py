"""Where a model's states rest when the device does not hold them: host memory or a file on NVMe, behind one interface.

home.py     the interface: a home keeps flat tensors in cells, which are fetched and stored asynchronously
memory.py   device and pinned host memory
nvme.py     a file that nobody else sees, read and written past the page cache by a few threads
homes.py    which of one model's states rest where
step.py     the optimizer's step, streaming over units: fetch, update, store
"""
