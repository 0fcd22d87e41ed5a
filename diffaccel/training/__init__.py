"""How networks are trained: phases, averages, objectives."""
