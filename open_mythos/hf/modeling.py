"""`OpenMythos` as a base model and a causal language model of transformers.

Shapes: B rows, T new tokens, D width, L loops, V vocabulary.
"""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from open_mythos import model_folder
from open_mythos.checks import check_int
from open_mythos.config import MAX_LOOPS
from open_mythos.hf.cache import MythosCache
from open_mythos.hf.configuration import MythosHFConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.halting import HaltingRule
from open_mythos.nn.inputs import check_ids, check_mask, check_room

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in arguments of `generate` and in outputs: transformers 5.24 renamed it."""
IGNORED = ("cache_position", "return_dict")
"""Arguments that callers of transformers' models pass along and that mean nothing here."""
REFUSED = {
    "inputs_embeds": "the loop starts from token ids; pass input_ids",
    "position_ids": "positions follow from attention_mask; leave position_ids out",
    "output_attentions": "attention weights are never formed; leave it out, or use mythos analyze",
}


class MythosPreTrainedModel(PreTrainedModel):
    """What both models share: loading and saving a model folder."""

    config_class = MythosHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["OpenMythos"]  # noqa: RUF012
    _prefix: str
    """Prefix of a tensor's name here, which it lacks in the file."""

    @property
    def net(self) -> OpenMythos:
        """The model of this package."""
        return self.get_submodule(self._prefix.rstrip("."))

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `OpenMythos` has drawn its values, and `from_pretrained` refuses a file that lacks some."""

    def get_input_embeddings(self) -> nn.Module:
        return self.net.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, and the head with it; `resize_token_embeddings` calls this."""
        self.net.embed, self.net.head.weight = value, value.weight
        self.net.cfg.vocab_size = self.net.head.out_features = value.num_embeddings

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        if self.net.recurrent is None:
            raise ValueError("recurrent_layers=0 makes a plain transformer, which has no checkpoints; leave it off")
        if every_n_layers != 1 or getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError("a checkpoint is one loop in the device's memory; leave every_n_layers and offload out")
        self.net.recurrent.checkpoint_loops = self.gradient_checkpointing = enable

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load a model folder as transformers does.

        Raises:
            ValueError: the tensors are not exactly those of the configuration, or `device_map` divides the model.
        """
        options["key_mapping"] = {"^": cls._prefix, **(options.get("key_mapping") or {})}
        model, info = super().from_pretrained(*args, output_loading_info=True, **options)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                names = ", ".join(sorted(map(str, info[kind]))[:5])
                raise ValueError(f"{args[0]} does not fit its config.json: {kind} {names}; copy or save it again")
        devices = set(getattr(model, "hf_device_map", {"": 0}).values())
        if len(devices) > 1:
            raise ValueError(f"device_map divides the model over {devices}, but its loop runs on one; name that one")
        for x in (*model.parameters(), *model.buffers()):
            if x.device.type == "cpu" and x.data_ptr() % 64:
                # Mapped from the file at an odd offset, where kernels round differently.
                x.data = x.data.clone()
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Write the folder of `OpenMythos.save_pretrained`, and `generation_config.json`. The weights are one file.

        Args:
            is_main_process: write; the other processes of a run only call this.
            state_dict: the tensors, where this model has not all of its own.
            push_to_hub: also upload the folder, by its name or as the option `repo_id`.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub=push_to_hub, **options)
            return
        if not is_main_process:
            return
        state = self.net.state_dict() if state_dict is None else state_dict
        state = {name.removeprefix(self._prefix): x for name, x in state.items()}
        model_folder.save(save_directory, self.config.mythos(), state)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), token=options.get("token"))


class MythosModel(MythosPreTrainedModel):
    """Embedding, prelude, loop, coda and norm, without the head."""

    _prefix = "mythos."
    _tied_weights_keys = {"mythos.head.weight": "mythos.embed.weight"}  # noqa: RUF012

    def __init__(self, config: MythosHFConfig) -> None:
        super().__init__(config)
        self.mythos = OpenMythos(config.mythos())
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: MythosCache | None = None,
        past_key_values: MythosCache | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, n_loops: int | None = None, exit: str | HaltingRule | None = None,
        exit_threshold: float | None = None, min_loops: int | None = None, **others: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Return what the head reads, (B, T, D).

        Args:
            attention_mask: (B, T), or with a cache also (B, earlier tokens + T); zero for padding on either side.
            cache, past_key_values: the same under the names of transformers 5.24 and before. The call appends to it,
                without gradients.
            use_cache: make a cache if none is given; None: as the configuration says, where gradients are off.
            output_hidden_states: also return the state after each loop and then what the head reads: L + 1 tensors
                (B, T, D).
            n_loops, exit, exit_threshold: as in `OpenMythos.forward`.
            min_loops: loops before which no token exits, in place of the configuration's.

        Raises:
            TypeError, ValueError: an argument is unusable; nothing has been computed and the cache is untouched.
        """
        # 1. Checks, before any work.
        _refuse(others)
        net, cache = self.net, _one_cache(cache, past_key_values)
        check_ids(input_ids, net.cfg)
        mask = _of_new_tokens(attention_mask, input_ids.shape[1])
        check_mask(input_ids, mask)
        rule = _exit_rule(net, exit, exit_threshold, min_loops)
        trace = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        depth, store = check_n_loops(n_loops, net.cfg), None
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if cache is not None or use_cache:
            cache = MythosCache() if cache is None else cache
            store = cache.open(net, *input_ids.shape, n_loops)
            depth = check_n_loops(n_loops, net.cfg, store.n_loops)
        check_room(input_ids, store, net.cfg, net.dtype, net.device)
        # 2. The stages of `OpenMythos`, without the head.
        plain = self.config._attn_implementation == "eager"
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and store is None),
            sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
        ):
            view = net.make_view((input_ids.shape[0], input_ids.shape[1]), mask, store)
            result = net.run_loop(input_ids, view, depth, rule, store, None, bool(trace))
            hidden = net.decode(result.out, view)
        if store is not None:
            store.advance(input_ids.shape[1], view.valid)
        states = (*(() if result.hidden is None else result.hidden), hidden) if trace else None
        return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states, **{CACHE: cache})


class MythosForCausalLM(MythosPreTrainedModel, GenerationMixin):
    """The whole model, with the head and the `generate` of transformers."""

    _prefix = "model.mythos."
    _tied_weights_keys = {"model.mythos.head.weight": "model.mythos.embed.weight"}  # noqa: RUF012

    def __init__(self, config: MythosHFConfig) -> None:
        super().__init__(config)
        self.model = MythosModel(config)
        self.n_loops: int | None = None
        """Loops of every call, whatever its `n_loops`; None: those of the call."""
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.net.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Do nothing: the head's weight is the embedding's, which `set_input_embeddings` replaces."""

    def draft(self, n_loops: int) -> "MythosForCausalLM":
        """Return this model at `n_loops` loops as `assistant_model` of `generate`; it shares the weights."""
        check_n_loops(n_loops, self.net.cfg)
        draft = copy.copy(self)
        draft.generation_config, draft.n_loops = copy.deepcopy(self.generation_config), n_loops
        return draft

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: MythosCache | None = None,
        past_key_values: MythosCache | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, logits_to_keep: int | Tensor = 0, n_loops: int | None = None,
        exit: str | HaltingRule | None = None, exit_threshold: float | None = None, min_loops: int | None = None,
        num_items_in_batch: Tensor | int | None = None, **others: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Return logits (B, T, V), and with `labels` the loss; further arguments are those of `MythosModel`.

        Args:
            labels: (B, T), each position's own token, or -100 for none; predictions are shifted here.
            logits_to_keep: logits of the last positions only. 1: of each row's last token, also where padding on the
                right follows it. 0: all.
            num_items_in_batch: what the sum of losses is divided by; None: the number of labels here.
        """
        outputs = self.model(
            input_ids, attention_mask, cache, past_key_values, use_cache, output_hidden_states,
            self.n_loops or n_loops, exit, exit_threshold, min_loops, **others,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        mask = _of_new_tokens(attention_mask, hidden.shape[1])
        if type(logits_to_keep) is int and logits_to_keep == 1 and mask is not None:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]
        else:
            hidden = hidden[:, slice(-logits_to_keep, None) if type(logits_to_keep) is int else logits_to_keep]
        logits, loss = self.net.head(hidden), None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Give `generate` a `MythosCache`, unless its caller has."""
        kind, longest = generation_config.cache_implementation, self.net.cfg.max_seq_len
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r} holds keys and values of one loop; use 'static', or leave it out"
            )
        if max_cache_length > longest:
            raise ValueError(
                f"prompt and new tokens make {max_cache_length + 1}, more than max_seq_len={longest}; use a smaller "
                "max_new_tokens"
            )
        if model_kwargs.get(CACHE) is not None:
            vars(_one_cache(model_kwargs[CACHE], None))["_is_user_defined"] = True
        elif generation_config.use_cache:
            model_kwargs[CACHE] = MythosCache(max_cache_length, kind == "static")

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> Tensor | None:
        """Return the mask of the new tokens, whose shape is the same in every step; the cache remembers the rest."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]


def _of_new_tokens(mask: Tensor | None, n_new: int) -> Tensor | None:
    """Return the part of a mask that covers the new tokens; None if none of them is padding."""
    if mask is None or mask.ndim != 2:
        return mask
    mask = mask[:, -n_new:]
    return None if not torch.compiler.is_compiling() and mask.all() else mask


def _exit_rule(
    net: OpenMythos, exit: str | HaltingRule | None, threshold: float | None, min_loops: int | None
) -> HaltingRule | None:
    rule = net.exit_rule(exit, threshold)
    if min_loops is None:
        return rule
    check_int("min_loops", min_loops, 1, MAX_LOOPS)
    if net.recurrent is None:
        raise ValueError(f"min_loops={min_loops}, but recurrent_layers=0 makes a plain transformer; leave it out")
    rule = copy.copy(rule or net.recurrent.rule)
    rule.min_loops = min_loops
    return rule


def _one_cache(cache: Any, past_key_values: Any) -> MythosCache | None:
    """Return the cache under either name."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of the same; give one of them")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, MythosCache):
        raise TypeError(f"cache is a {type(given).__name__}, which has one level per layer; use hf.MythosCache()")
    return given


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is None or value is False or name in IGNORED:
            continue
        why = REFUSED.get(name, "see help(MythosForCausalLM.forward)")
        raise TypeError(f"forward() cannot use {name}: {why}")
