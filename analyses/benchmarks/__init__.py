"""benchmarks: what mambascope costs beside what people use now, on the same weights in the same process."""
