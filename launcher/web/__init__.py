"""The dashboard in a browser: `distui monitor --web`."""
