"""Exit thresholds chosen from a target: a record of the full cascade, a search on it, its report."""
