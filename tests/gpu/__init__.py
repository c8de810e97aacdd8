"""What only a real accelerator can show. Skipped without one; `benchmarks/gpu.sh` runs it."""
