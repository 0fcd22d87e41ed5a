"""Running of experiments: processes, devices, output folders."""
