"""Where a model's states rest when the device does not hold them: host memory or a file on NVMe, behind one interface.

Way in: `homes.open_homes`. `home` is the interface: a home keeps flat tensors in cells, which are fetched and stored
asynchronously; `memory` and `nvme` are the homes, the latter past the page cache by a few threads; `step` streams the
optimizer's step over units. Must not know modules, hooks or when a unit is gathered.
"""
