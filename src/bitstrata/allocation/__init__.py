"""Bits for each layer from a budget: what layers cost, solvers, and the order of pages."""

from .objective import Objective
from .order import page_order
from .problem import Bounds, Problem, random_allocation
from .report import PlanReport, PlanRow
from .run import SOLVERS, plan
from .sensitivity import SENSITIVITY_FILE, Measure, MeasurementSettings, Sensitivity, measure_sensitivity

__all__ = [
    "SENSITIVITY_FILE",
    "SOLVERS",
    "Bounds",
    "Measure",
    "MeasurementSettings",
    "Objective",
    "PlanReport",
    "PlanRow",
    "Problem",
    "Sensitivity",
    "measure_sensitivity",
    "page_order",
    "plan",
    "random_allocation",
]
