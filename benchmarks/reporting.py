"""End of every benchmark: where it ran, and its goals as one line of JSON."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

GOAL_MFU = {32: 0.5, 128: 0.6}
"""Side of the latents -> goal of the 1B model on one H100 or H200: 256 and 1,024 pixels."""


class Goal(NamedTuple):
    """A measured value and the bound that it should keep."""

    value: float
    goal: float
    met: bool

    def __str__(self) -> str:
        return f"{self.value:.3g} (goal {self.goal:g}: {'met' if self.met else 'missed'})"


def at_least(value: float, bound: float) -> Goal:
    """A goal from below."""
    return Goal(value, bound, value >= bound)


def at_most(value: float, bound: float) -> Goal:
    """A goal from above."""
    return Goal(value, bound, value <= bound)


def print_goals(benchmark: str, goals: dict[str, Goal], **figures: object) -> None:
    """Print the last line of a benchmark: its goals, and other figures that a program might read, as JSON."""
    rounded = {name: goal._asdict() | {"value": float(f"{goal.value:.4g}")} for name, goal in goals.items()}
    print(json.dumps({"benchmark": benchmark, "goals": rounded, **figures}))


def hardware() -> str:
    """The accelerator, or else the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    """Libraries that the numbers depend on."""
    python, torch_version = platform.python_version(), torch.__version__
    return f"Python {python}, torch {torch_version}, transformers {transformers.__version__}"


def conditions() -> str:
    """Date, hardware and versions of a run, for the head of its table."""
    return f"{date.today()}; {hardware()}; {versions()}"
