"""Processes, devices and folders of a run."""
