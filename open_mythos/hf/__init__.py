"""The model as transformers knows models: `AutoModelForCausalLM`, `generate`, trainers. Importing this registers it.

The classes wrap `OpenMythos` and have no forward pass of their own. Folders are those of `OpenMythos.save_pretrained`.
"""

from open_mythos import extras

extras.load("transformers", "hf", "open_mythos.hf")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from open_mythos.hf.cache import MythosCache as MythosCache  # noqa: E402
from open_mythos.hf.configuration import MythosHFConfig as MythosHFConfig  # noqa: E402
from open_mythos.hf.modeling import MythosForCausalLM as MythosForCausalLM  # noqa: E402
from open_mythos.hf.modeling import MythosModel as MythosModel  # noqa: E402

AutoConfig.register(MythosHFConfig.model_type, MythosHFConfig)
AutoModel.register(MythosHFConfig, MythosModel)
AutoModelForCausalLM.register(MythosHFConfig, MythosForCausalLM)
AutoTokenizer.register(MythosHFConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
