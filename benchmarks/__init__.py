"""Measurements at real size: checkpoints, memory limits, disk bandwidth and forwards. See README.md."""
