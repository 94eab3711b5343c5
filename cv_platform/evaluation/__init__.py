"""Judges a trained model on the test split: metrics, calibration, worst errors, promotion verdict."""
