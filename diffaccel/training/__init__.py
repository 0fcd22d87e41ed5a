"""Training of networks: phases, averaged weights, objectives."""
