"""Files beside a trained model, for its users: `README.md`, the model card, and `generation_config.json`."""

import json
from pathlib import Path

from open_mythos.accounting import count_parameters
from open_mythos.tokenization.tokenizer import Tokenizer
from open_mythos.train.config import TrainConfig

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [open_mythos, recurrent-depth]
---
# {name}

A language model that applies one block again and again: {parameters:,} parameters, {loops} loops unless a call names
others. Trained for {steps:,} steps of {rows} rows of {tokens} tokens with seed {seed}.

```python
from transformers import AutoModelForCausalLM
import open_mythos.hf

model = AutoModelForCausalLM.from_pretrained(FOLDER)  # or open_mythos.OpenMythos.from_pretrained(FOLDER)
```

## The run

```yaml
{config}```
"""


def save_model_card(folder: Path, run: TrainConfig, tokenizer: Tokenizer) -> None:
    """Write both files into the folder of the run's model."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    special = {name: i for name, i in ids.items() if i is not None}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    card = CARD.format(
        name=run.data.name,
        parameters=count_parameters(run.model).total,
        loops=run.model.max_loop_iters,
        steps=run.steps,
        rows=run.batch_size,
        tokens=run.data.seq_len,
        seed=run.seed,
        config=run.to_yaml(),
    )
    (folder / "README.md").write_text(card, "utf-8")
