"""ZeRO 0-3 as one mechanism: flat buffers, views, and collectives in one fixed order."""
