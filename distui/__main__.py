"""`python -m distui` is the `distui` command."""

from distui.launcher.cli import main

if __name__ == "__main__":
    main()
