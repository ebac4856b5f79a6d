"""Transformers' `Trainer` on distui's engine, with no line of the script changed.

Way in: `install.install_trainer`, which the first code of a rank calls once the script has imported transformers.
`accelerator` is the face as Trainer uses it, `callback` tells the dashboard. Must not import transformers before the
script does.
"""
