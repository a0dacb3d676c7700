"""Experiments, one file each: arms to compare, what is measured, and a page that the numbers fill."""

from typing import Any

EXPERIMENTS: dict[str, Any] = {
    "addition": "open_mythos.experiments.addition:STUDY",
    "khop": "open_mythos.experiments.khop:STUDY",
    "parity": "open_mythos.experiments.parity:STUDY",
    "brackets": "open_mythos.experiments.brackets:STUDY",
    "verify": "open_mythos.experiments.verify:STUDY",
    "stability": "open_mythos.experiments.stability:STUDY",
    "exits": "open_mythos.experiments.exits:STUDY",
    "loop_roles": "open_mythos.experiments.loop_roles:STUDY",
    "adaptive": "open_mythos.experiments.adaptive:STUDY",
    "small_text": "open_mythos.experiments.small_text:STUDY",
}
"""The studies by name, in the order of `mythos exp list`: a `Study`, or the path to import it from, so that the names
are known before torch is imported. Your own: `EXPERIMENTS["mine"] = Study(...)`."""
