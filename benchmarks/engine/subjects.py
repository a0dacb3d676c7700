"""The models that the engine is measured on, and by what rules their tokens leave the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from benchmarks.cases.exits import RULE
from benchmarks.engine.laws import DEEPEST, LAWS, PrescribedDepths
from benchmarks.models import LOOP_HEAVY
from benchmarks.sides.exits import RECIPE, trained
from open_mythos import MythosConfig, OpenMythos
from open_mythos.nn.halting import HaltingRule
from open_mythos.recipes import load_recipe
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.variants import mythos_30m

N_PROMPT = 17
"""Tokens of a prompt: a page, which requests share, and one more, which they compute."""
N_PROMPTS = 4
OWN = "its own rule"


@dataclass(frozen=True)
class Subject:
    """A model at a number of loops."""

    name: str
    title: str
    n_loops: int
    laws: tuple[str, ...]
    build: Callable[[str], OpenMythos]
    """From the folder of the trained model."""

    def rule(self, law: str) -> dict[str, Any]:
        """Fields of SamplingParams that make tokens leave by this law."""
        return RULE if law == OWN else {"exit": PrescribedDepths(LAWS[law])}

    def rule_object(self, law: str, model: OpenMythos) -> HaltingRule:
        """The same as an object."""
        rule = model.exit_rule(
            **{"threshold" if name == "exit_threshold" else name: x for name, x in self.rule(law).items()}
        )
        assert rule is not None
        return rule

    def prompts(self) -> list[list[int]]:
        """Random ids, or for the trained model the beginnings of windows of held-out text."""
        if self.laws == (OWN,):
            batch = load_recipe(RECIPE).data.validation_batch(stream(0, 0, Purpose.VALIDATION), N_PROMPTS)
            return batch.input_ids[:, :N_PROMPT].tolist()
        generator = torch.Generator().manual_seed(0)
        return torch.randint(LOOP_HEAVY["vocab_size"], (N_PROMPTS, N_PROMPT), generator=generator).tolist()


def _fresh(cfg: MythosConfig) -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(cfg).eval()


@lru_cache(maxsize=1)
def model_of(subject: Subject, folder: str) -> OpenMythos:
    """The subject's model; the last one asked for is kept."""
    return subject.build(folder)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "heavy",
            "loop-heavy: 1 prelude and 1 coda layer, 16 experts x 512",
            DEEPEST,
            tuple(LAWS),
            lambda _: _fresh(MythosConfig(**LOOP_HEAVY)),
        ),
        Subject("30m", "mythos_30m at 16 loops", DEEPEST, tuple(LAWS), lambda _: _fresh(mythos_30m())),
        Subject("trained", f"trained `{RECIPE}`", 8, (OWN,), lambda folder: trained(folder, "cpu")),
    )
}
