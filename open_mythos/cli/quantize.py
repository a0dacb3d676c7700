"""The command that stores a model's weights in one byte each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos.cli.options import check_folder


@dataclass(kw_only=True)
class Quantize:
    """Round the large matrices of a model to int8, for inference: half the size of bfloat16.

    `generate`, `chat`, `serve`, `eval` and `analyze` take the new folder like any other. It cannot be trained further.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    out: Path
    """Folder to write, which must not exist."""

    def run(self, rest: list[str]) -> None:
        """store a model's weights as int8, which halves bfloat16's memory"""
        check_folder(self.folder)
        from open_mythos.evals.by_loops import trained_context
        from open_mythos.model import OpenMythos
        from open_mythos.model_folder import WEIGHTS_FILE
        from open_mythos.nn.quantized import quantize
        from open_mythos.tokenization.chat_template import save_template, turns_unknown
        from open_mythos.tokenization.tokenizer import load_tokenizer
        from open_mythos.train.run_folder import save_model_folder

        tokenizer = load_tokenizer(self.folder)
        model = quantize(OpenMythos.from_pretrained(self.folder))
        save_model_folder(model.cfg, model.state_dict(), tokenizer, self.out)
        if not turns_unknown(self.folder, ""):
            save_template(self.out)
        before, after = ((folder / WEIGHTS_FILE).stat().st_size for folder in (self.folder, self.out))
        print(f"{self.out} has {after:,} bytes of weights, {after / before:.0%} of {before:,}.")
        # A run's folder says what it was trained on, this one does not.
        context = trained_context(self.folder) or model.cfg.max_seq_len
        print(f"Compare both on a text: mythos eval {self.out} --text FILE --context {context}")
