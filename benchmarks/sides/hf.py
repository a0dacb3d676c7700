"""Models of transformers with random weights, run with its defaults."""

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.job import Job
from benchmarks.peers import TRANSFORMERS, installed
from benchmarks.tasks import Side

# In front: with the versions of its requirements that pip chose for it.
sys.path.insert(0, str(installed(TRANSFORMERS)))
transformers: Any = importlib.import_module("transformers")


class Transformer(Side):
    """A causal language model of the class that the job's model names."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(job.seed)
        fields = {name: value for name, value in job.model.items() if name != "class"}
        kind, self.vocab_size = job.model["class"], job.model["vocab_size"]
        config = getattr(transformers, f"{kind}Config")(**fields)
        self.model = getattr(transformers, f"{kind}ForCausalLM")(config).to(job.device)
        # No token ends a row: the number of tokens is fixed.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def info(self) -> dict[str, Any]:
        # The parameters that one token meets: of stacked experts the chosen ones, the tied embedding as head.
        cfg, active = self.model.config, 0.0
        for name, p in self.model.named_parameters():
            stacked = ".experts." in name and p.ndim == 3
            active += p.numel() * (cfg.num_experts_per_tok / p.shape[0] if stacked else 1)
        return {"flops_per_token": 2 * round(active)}

    def new_cache(self, rows: int, max_len: int, n_loops: int) -> Any:
        return transformers.DynamicCache(config=self.model.config)

    def feed(self, ids: Tensor, cache: Any, start: int, n_loops: int) -> Tensor:
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def generate(self, ids: Tensor, new_tokens: int, n_loops: int) -> Tensor:
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)


make = Transformer
