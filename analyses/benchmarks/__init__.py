"""benchmarks: what mambascope costs beside HF transformers and mambapy, on the same weights in the same process."""
