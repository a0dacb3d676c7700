"""The configuration of transformers, with the fields of `MythosConfig` as its attributes."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from open_mythos.config import MythosConfig
from open_mythos.model_folder import FOLDER_KEYS, SAVED_DIGEST


class MythosHFConfig(PreTrainedConfig):
    """A `MythosConfig` for transformers.

    Args:
        values: fields of `MythosConfig` and of transformers' configurations.

    Raises:
        TypeError, ValueError: as for `MythosConfig`.
    """

    model_type = "open_mythos"
    attribute_map = {  # noqa: RUF012 - transformers' name and type
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(self, **values: Any) -> None:
        # The digest belongs to the file, and a changed configuration would carry it along.
        values.pop(SAVED_DIGEST, None)
        known = [field.name for field in dataclasses.fields(MythosConfig)]
        own = {name: values.pop(name) for name in known if name in values}
        cfg = MythosConfig.from_dict(own)
        for name in known:
            setattr(self, name, getattr(cfg, name))
        self.use_cache, self.tie_word_embeddings = True, cfg.tie_embeddings
        super().__init__(**values)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks that one token passes at `max_loop_iters` loops."""
        return self.prelude_layers + self.recurrent_layers * self.max_loop_iters + self.coda_layers

    def mythos(self) -> MythosConfig:
        """Return the fields of this package."""
        fields = dataclasses.fields(MythosConfig)
        return MythosConfig(**{field.name: getattr(self, field.name) for field in fields})

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds: the keys of a model folder, which `OpenMythos.from_pretrained` reads."""
        return {**FOLDER_KEYS, **self.mythos().to_dict()}
