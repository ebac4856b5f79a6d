"""`distui.notebook_launcher`: the same launch from a cell, for a function that is defined there.

Way in: `launcher.notebook_launcher`. `call` runs the pickled function in a rank, `view` is what the cell shows.
Must not start ranks itself: `launcher/job` does.
"""
