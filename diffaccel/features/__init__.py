"""Feature networks that score images."""
