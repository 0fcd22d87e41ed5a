"""Timings, as ratios within one run; and whether distances order known damage."""
