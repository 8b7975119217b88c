"""Measurements: ratios and paired differences against a floor measured in the same run."""
