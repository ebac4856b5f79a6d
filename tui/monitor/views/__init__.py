"""The views of the dashboard, one a module; each draws what it is given and keeps nothing of the run."""
