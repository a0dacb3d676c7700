"""What a run costs before it is started: parameters, memory, FLOPs, communication, time."""

from open_mythos.costs.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
