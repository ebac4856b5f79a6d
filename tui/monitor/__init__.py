"""The live dashboard, and the same for a recording.

Way in: `app.run_dashboard`. One worker fills `model.RunModel` from the daemon's updates; `views` draw it, a file each;
`verdict` says in a line whether the run is well; `control` and `acting` ask the job for something. Must not stop a job
by leaving, and shows n/a for what it does not know.
"""
