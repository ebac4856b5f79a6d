"""What is broken on a machine, or soon will be.

Way in: `checks.examine`; rules about versions are data in `versions`, and `findings.Finding` is what each says.
Must not change anything.
"""
