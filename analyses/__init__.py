"""Studies, one folder each: the question, the command that answers it, the results with their provenance."""
