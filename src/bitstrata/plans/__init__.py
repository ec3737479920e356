"""Any size: plans, budgets, the order of pages, and models that hold one plan's pages and change it while they run."""

from ..arguments import parse_bits
from .budget import Budget, ModelSizes, PlanBytes, bytes_text, parse_budget
from .fit import fit_budget
from .load import load
from .order import PAGES_FILE, Page, PageOrder
from .page_reader import PageReader
from .parsing import (
    bits_name,
    check_plan_name,
    choose_bits,
    highest_bits,
    parse_bits_or_plan,
    parse_bits_or_plans,
    parse_target,
)
from .plan import Plan, layers
from .resize import Resized, resize

__all__ = [
    "PAGES_FILE",
    "Budget",
    "ModelSizes",
    "Page",
    "PageOrder",
    "PageReader",
    "Plan",
    "PlanBytes",
    "Resized",
    "bits_name",
    "bytes_text",
    "check_plan_name",
    "choose_bits",
    "fit_budget",
    "highest_bits",
    "layers",
    "load",
    "parse_bits",
    "parse_bits_or_plan",
    "parse_bits_or_plans",
    "parse_budget",
    "parse_target",
    "resize",
]
