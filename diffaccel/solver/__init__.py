"""Solvers of the reverse process, their grids, and the sampling loop."""

from diffaccel.solver import adaptive, bridge, exponential, multistep, onestep, stochastic, unipc
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, where_finite
from diffaccel.solver.grid import GRIDS, Grid, Indices, Karras, Listed, LogSNR, Quadratic, TimeToZero, UniformTime
from diffaccel.solver.multistep import DEFAULT

__all__ = [
    "DEFAULT",
    "GRIDS",
    "SOLVERS",
    "Grid",
    "Indices",
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
    "bridge",
    "exponential",
    "multistep",
    "onestep",
    "stochastic",
    "unipc",
    "where_finite",
]
