"""Reverse integrators by name, their grids, and the one loop that runs them."""

from diffaccel.solver import adaptive, multistep, onestep, stochastic
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, where_finite
from diffaccel.solver.grid import GRIDS, Grid, Karras, LogSNR, TimeToZero, UniformTime

__all__ = [
    "GRIDS",
    "SOLVERS",
    "Grid",
    "Karras",
    "LogSNR",
    "Past",
    "Solver",
    "TimeToZero",
    "Trajectory",
    "UniformTime",
    "adaptive",
    "multistep",
    "onestep",
    "stochastic",
    "where_finite",
]
