"""Runs: where they lie, what is known of each, how it is kept and read back.

Way in: `folders.find_run`, `snapshot.read_snapshot` (a run as it is now, no daemon needed), `state.RunState`, which
reduces batches alike whether they come live or from `store`, and `recording.Recording` for any moment of the past.
Must not know sockets, servers or watchers.
"""
