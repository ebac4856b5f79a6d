"""Widgets on the Line API, fast enough for a thousand ranks."""
