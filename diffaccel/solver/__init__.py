"""Reverse integrators by name, their grids, and the one loop that runs them."""

from diffaccel.solver import adaptive, exponential, multistep, onestep, stochastic, unipc
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, where_finite
from diffaccel.solver.grid import GRIDS, Grid, Karras, Listed, LogSNR, Quadratic, TimeToZero, UniformTime

__all__ = [
    "GRIDS",
    "SOLVERS",
    "Grid",
    "Karras",
    "Listed",
    "LogSNR",
    "Past",
    "Quadratic",
    "Solver",
    "TimeToZero",
    "Trajectory",
    "UniformTime",
    "adaptive",
    "exponential",
    "multistep",
    "onestep",
    "stochastic",
    "unipc",
    "where_finite",
]
