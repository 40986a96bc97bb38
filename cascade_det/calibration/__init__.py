"""Exits for a target: record the full cascade, search on the recording, report."""
