"""Exit thresholds from a target: a record of the full cascade, the search on it, its report."""
