"""The walk of the calibration samples through a model's blocks."""
