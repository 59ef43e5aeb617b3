"""What is asked of the trained models, each part from numbers in a results file: `accuracy`, `patching`, ..."""
