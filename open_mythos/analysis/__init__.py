"""Analyses of what a trained model does in each of its loops."""

from collections.abc import Callable

from open_mythos.analysis import breadth, fixed_point, injection, jacobian, lens, loop_roles_section, routing, sweep
from open_mythos.analysis.section import Section, Subject

SECTIONS: dict[str, Callable[[Subject], Section]] = {
    "sweep": sweep.section,
    "lens": lens.section,
    "fixed_point": fixed_point.section,
    "jacobian": jacobian.section,
    "injection": injection.section,
    "routing": routing.section,
    "loop_roles": loop_roles_section.section,
    "breadth": breadth.section,
}
"""The sections of `mythos analyze` in the order of its report, by their names in analysis.json; add your own."""
