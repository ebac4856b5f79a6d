"""The dashboard in a browser: `distui monitor --web`.

Way in: `server.DashboardServer`, which runs the terminal's dashboard once for each browser tab that knows the token.
Loopback only. Must not know what the dashboard shows.
"""
