"""Generation and prefill with exits, by this package's trained model: the timed tasks of `cases.exits`.

Shapes: B rows, T prompt tokens, N new tokens.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides import first_of
from benchmarks.tasks import Task
from open_mythos import KVCache, OpenMythos

load_recipe = first_of("open_mythos.recipes:load_recipe")
Purpose = first_of("open_mythos.tasks.rng:Purpose", "open_mythos.train.rng:Purpose")
stream = first_of("open_mythos.tasks.rng:stream", "open_mythos.train.rng:stream")
RECIPE = "adaptive-text"


@cache
def trained(folder: str, device: str) -> OpenMythos:
    """Load the recipe's model, in eval mode.

    Raises:
        FileNotFoundError: it has not been trained; the message names the command.
    """
    if not Path(folder).is_dir():
        remedy = f"make it with `mythos train {RECIPE} --out {Path(folder).parent}` or name another in"
        raise FileNotFoundError(
            f"{folder} does not exist: cases of exits need a trained model; {remedy} OPEN_MYTHOS_ADAPTIVE"
        )
    return OpenMythos.from_pretrained(folder, device)


def held_out_text(seed: int, place: int, rows: int) -> Tensor:
    """Draw windows of the text that was held out from training, (rows, 512)."""
    return load_recipe(RECIPE).data.validation_batch(stream(seed, place, Purpose.VALIDATION), rows).input_ids


class Exits(Task):
    """A task on held-out text. `arguments`: folder, exit ("fixed" for full depth) and exit_threshold (None: none)."""

    compaction = "counts"
    """How often the driver leaves exited tokens out of the computation."""

    def setup(self) -> None:
        job = self.job
        self.model = trained(job.arguments["folder"], job.device)
        self.rule = {name: job.arguments[name] for name in ("exit", "exit_threshold")}
        self.draw(0)

    def info(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def draw(self, seed: int) -> None:
        text = held_out_text(self.job.seed, seed, self.job.rows)
        self.ids = text[:, : self.job.tokens].to(self.job.device)

    def fresh(self) -> Any:
        block: Any = self.model.recurrent
        block.compaction = self.compaction

    @torch.no_grad()
    def trace(self, ids: Tensor) -> Any:
        """Run a full pass without a cache -> its LoopTrace."""
        return self.model(ids, self.job.n_loops, trace=True, **self.rule)


class Generate(Exits):
    """Greedy continuation; the timed path."""

    def draw(self, seed: int) -> None:
        super().draw(seed)
        self.prompt_depth = (self.trace(self.ids).exit_loop + 1).double().mean().item()

    def run(self, fresh: Any) -> dict[str, Tensor]:
        options: dict[str, Any] = {"temperature": 0, "return_loops": True, **self.rule}
        tokens, depths = self.model.generate(self.ids, self.job.new_tokens, self.job.n_loops, **options)
        # Loops of every new token, row by row, and mean loops of the prompts' tokens.
        self.measured = {"depths": depths.tolist(), "prompt_depth": self.prompt_depth}
        return {"tokens": tokens, "depths": depths}


class GenerateReference(Generate):
    """The same text the slow way: a full pass over the whole text for every token, without a cache or compaction."""

    compaction = "never"

    def run(self, fresh: Any) -> dict[str, Tensor]:
        ids, depths = self.ids, []
        for _ in range(self.job.new_tokens):
            out = self.trace(ids)
            ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), dim=1)
            depths.append(out.exit_loop[:, -1] + 1)
        return {"tokens": ids, "depths": torch.stack(depths, dim=1)}


class Prefill(Exits):
    """A prompt into an empty cache, and the logits of its last position; the timed path."""

    def setup(self) -> None:
        super().setup()
        assert self.model.recurrent is not None
        self.seen: dict[str, Tensor] = {}
        self.model.recurrent.register_forward_hook(lambda block, inputs, output: self.seen.update(loops=output.loops))

    def run(self, fresh: Any) -> dict[str, Tensor]:
        kv = self.model.make_cache(self.job.rows, self.job.tokens + 1, self.job.n_loops)
        logits = self.model(self.ids, self.job.n_loops, cache=kv, last_only=True, **self.rule)
        loops = self.seen["loops"]
        self.measured = {"mean_depth": loops.double().mean().item()}
        return {"logits": logits[:, -1], "depths": loops}


class PrefillReference(Prefill):
    """The same logits without a cache or compaction."""

    compaction = "never"

    def run(self, fresh: Any) -> dict[str, Tensor]:
        out = self.trace(self.ids)
        return {"logits": out.logits[:, -1], "depths": out.exit_loop + 1}


class Decode(Exits):
    """The last `new_tokens` of T tokens one by one, behind a cache of those before."""

    def draw(self, seed: int) -> None:
        super().draw(seed)
        self.cache = self.model.make_cache(self.job.rows, self.job.tokens, self.job.n_loops)
        self.model(self.ids[:, : -self.job.new_tokens], cache=self.cache, last_only=True, **self.rule)

    def fresh(self) -> KVCache:
        super().fresh()
        return copy.deepcopy(self.cache)

    def run(self, fresh: KVCache) -> dict[str, Tensor]:
        for token in self.ids[:, -self.job.new_tokens :].split(1, dim=1):
            logits = self.model(token, cache=fresh, last_only=True, **self.rule)
        return {"logits": logits}


TASKS: dict[str, type[Task]] = {"exits_decode": Decode, "exits_generate": Generate, "exits_prefill": Prefill}
TASKS |= {"exits_generate_reference": GenerateReference, "exits_prefill_reference": PrefillReference}
