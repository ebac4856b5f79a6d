"""The commands of `distui`, a file each, with a click command named `command`.

Way in: `distui.launcher.cli`, which loads a file only when its command is called. They parse and print; must not know
how: what they do lives in the other rooms, imported inside their functions.
"""
