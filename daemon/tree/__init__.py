"""Jobs on many nodes: each node's daemon rolls its ranks up once a second, and sends that to the one above it.

Way in: `relay.Relay`, which makes, merges and forwards roll-ups; at the head `many.Many` keeps them, a row a rank in
columns, and `together` says what is wrong across nodes. Raw telemetry stays on its node, and is asked for by name. It
must not know who watches, nor how nodes were started.
"""
