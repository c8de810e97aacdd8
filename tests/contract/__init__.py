"""The guide's contract: what Accelerate documents of its big model inference, run against it and against us.

A test that takes the `engine` fixture runs on both. Where ours differs on purpose, the test names no engine and its
docstring says why.
"""
