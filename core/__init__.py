"""The engine's side of distui: settings, hardware, planner, sharding, checkpoints, and what a rank tells of itself.

Each folder is a room on a floor, and imports rooms of lower floors only (docs/architecture.md draws them,
tests/package/test_floors.py holds them). Way in: `engine` for a training script, `config`, `hardware` and `plan` for
the command line and the wizard, which load no torch. Knows no daemon, launcher or screen.
"""
