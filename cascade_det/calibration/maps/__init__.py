"""Calibration of a segmenter's exits."""
