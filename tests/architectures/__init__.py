"""Every architecture of the Auto classes, built tiny, loaded over little memory and compared bit for bit.

`python -m tests.architectures` runs them all and writes RESULTS.md.
"""
