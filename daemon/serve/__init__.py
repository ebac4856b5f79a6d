"""The daemon as a server: telemetry in, watchers and control, metrics, TLS and tokens, and other daemons.

Way in: `server.run_daemon`. `intake`, `monitor` and `control` are the three gRPC services, `live` holds the runs in
memory, `forward` sends them on to a head daemon, `security` says who may call what. All on one event loop; must not
judge a run itself.
"""
