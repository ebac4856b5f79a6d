"""What a rank tells: steps, memory, and every collective, to the daemon of its node and to a file that outlives it.

Way in: `source.open_source` for a rank, `source.current` for whoever has something to tell; `ledger.LedgerReader` and
`stacks` for who looks at a rank from outside, `endpoint.Endpoint` for who calls a daemon, `control` for the rank's end
of the control bus. The training thread only puts into `ring` and `ledger`; a side thread (`sender`) does the rest.
Must not load torch (`collectives` alone does, once torch is there), stop training, or know what is trained.
"""
