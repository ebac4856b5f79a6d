"""The command line, and the ways to start ranks.

Way in: `cli.main`, which imports a command of `commands` only to run it. Ranks are started in one way, `job`; what runs
on a node is in `node`. May import everything, inside functions; must not load torch in the command's own process.
"""
