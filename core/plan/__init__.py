"""Memory and time of a training plan, from formulas; never imports torch."""
