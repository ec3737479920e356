"""Bits for each layer from a budget: what layers cost, solvers, and the order of pages."""

from .objective import Objective
from .order import page_order
from .problem import Bounds, Problem, random_allocation
from .report import PlanReport, PlanRow
from .run import SOLVERS, plan
from .sensitivity import SENSITIVITY_FILE, Measure, Sensitivity, Settings, measure_sensitivity

__all__ = [
    "SENSITIVITY_FILE",
    "SOLVERS",
    "Bounds",
    "Measure",
    "Objective",
    "PlanReport",
    "PlanRow",
    "Problem",
    "Sensitivity",
    "Settings",
    "measure_sensitivity",
    "page_order",
    "plan",
    "random_allocation",
]
