"""Generation and prefill with exits, by this package's trained model: what the cases of `cases.exits` time.

Shapes: B rows, T prompt tokens, N new tokens.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.job import Job
from open_mythos import OpenMythos
from open_mythos.nn.cache import KVCache
from open_mythos.nn.eval_mode import evaluating
from open_mythos.recipes import load_recipe
from open_mythos.tasks.rng import Purpose, stream

RECIPE = "adaptive-text"


@cache
def trained(folder: str, device: str) -> OpenMythos:
    """The recipe's model.

    Raises:
        FileNotFoundError: it has not been trained; the message says how.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: cases of exits need a trained model; make it with `mythos train {RECIPE} --out "
            f"{Path(folder).parent}` or name another in OPEN_MYTHOS_ADAPTIVE"
        )
    return OpenMythos.from_pretrained(folder, device)


class Exits:
    """A task on held-out text. `arguments`: folder, exit ("fixed" for full depth) and exit_threshold (None: none)."""

    training = False
    counts_loops = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = trained(job.arguments["folder"], job.device)
        self.exit, self.threshold = job.arguments["exit"], job.arguments["exit_threshold"]
        self.outputs: dict[str, Tensor] = {}
        self.draw(0)

    def info(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def draw(self, seed: int) -> None:
        """Other prompts, from `seed`: windows of the text that was held out from training."""
        rng = stream(self.job.seed, seed, Purpose.VALIDATION)
        text = load_recipe(RECIPE).data.validation_batch(rng, self.job.rows).input_ids
        self.ids = text[:, : self.job.tokens].to(self.job.device)

    def reading(self) -> dict[str, Any]:
        return {}

    def fresh(self) -> Any:
        assert self.model.recurrent is not None
        self.model.recurrent.compaction = "counts"

    def compute(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def run(self, fresh: Any) -> dict[str, Tensor]:
        self.outputs = self.compute()
        return self.outputs


class Generate(Exits):
    """Greedy continuation; the timed path."""

    def draw(self, seed: int) -> None:
        super().draw(seed)
        with evaluating(self.model):
            trace = self.model(self.ids, self.job.n_loops, exit=self.exit, exit_threshold=self.threshold, trace=True)
        self.prompt_depth = (trace.exit_loop + 1).double().mean().item()

    def compute(self) -> dict[str, Tensor]:
        tokens, depths = self.model.generate(
            self.ids,
            self.job.new_tokens,
            self.job.n_loops,
            temperature=0,
            exit=self.exit,
            exit_threshold=self.threshold,
            return_loops=True,
        )
        return {"tokens": tokens, "depths": depths}

    def reading(self) -> dict[str, Any]:
        """Loops of every new token, row by row, and mean loops of the prompts' tokens."""
        return {"depths": self.outputs["depths"].tolist(), "prompt_depth": self.prompt_depth}


class Reference(Generate):
    """The same text the slow way: for every token a full pass over all before it, without a cache, that leaves nothing
    out of the computation."""

    def compute(self) -> dict[str, Tensor]:
        assert self.model.recurrent is not None
        self.model.recurrent.compaction = "never"
        ids, depths = self.ids, []
        with evaluating(self.model):
            for _ in range(self.job.new_tokens):
                out = self.model(ids, self.job.n_loops, exit=self.exit, exit_threshold=self.threshold, trace=True)
                ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), dim=1)
                depths.append(out.exit_loop[:, -1] + 1)
        return {"tokens": ids, "depths": torch.stack(depths, dim=1)}


class Prefill(Exits):
    """A prompt into an empty cache, and the logits of its last position; the timed path."""

    def compute(self) -> dict[str, Tensor]:
        model, (B, T) = self.model, self.ids.shape
        with evaluating(model):
            kv = model.make_cache(B, T + 1, self.job.n_loops)
            rule = model.exit_rule(self.exit, self.threshold)
            view = model.make_view((B, T), None, kv)
            logits, result = model.run(self.ids, view, self.job.n_loops, rule, kv, last_only=True)
        return {"logits": logits[:, -1], "depths": result.loops}

    def reading(self) -> dict[str, Any]:
        """Mean loops of a token."""
        return {"mean_depth": self.outputs["depths"].double().mean().item()}


class PrefillReference(Prefill):
    """The same without a cache, leaving nothing out of the computation."""

    def compute(self) -> dict[str, Tensor]:
        assert self.model.recurrent is not None
        self.model.recurrent.compaction = "never"
        with evaluating(self.model):
            out = self.model(self.ids, self.job.n_loops, exit=self.exit, exit_threshold=self.threshold, trace=True)
        return {"logits": out.logits[:, -1], "depths": out.exit_loop + 1}


class Decode(Exits):
    """The last `new_tokens` of T tokens one by one, behind a cache of those before."""

    def draw(self, seed: int) -> None:
        super().draw(seed)
        self.cache = self.model.make_cache(self.job.rows, self.job.tokens, self.job.n_loops)
        self._feed(self.ids[:, : -self.job.new_tokens], self.cache)

    def fresh(self) -> Any:
        super().fresh()
        return copy.deepcopy(self.cache)

    def run(self, fresh: Any) -> dict[str, Tensor]:
        for token in self.ids[:, -self.job.new_tokens :].split(1, dim=1):
            logits = self._feed(token, fresh)
        return {"logits": logits}

    def _feed(self, ids: Tensor, kv: KVCache) -> Tensor:
        return self.model(ids, cache=kv, exit=self.exit, exit_threshold=self.threshold, last_only=True)


TASKS = {
    "exits_decode": Decode,
    "exits_generate": Generate,
    "exits_generate_reference": Reference,
    "exits_prefill": Prefill,
    "exits_prefill_reference": PrefillReference,
}
