"""Benchmarks: overhead, distances of damaged images, densities, priors, training efficiency and ablations."""
