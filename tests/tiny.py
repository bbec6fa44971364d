"""What tests share: small models, tokens and weights, random but the same each time; `says`."""

import re

import torch

VOCABULARY = 100


def generator(seed=13):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def weight():
    """A layer's weight, for panels: 96 x 128."""
    return normal(96, 128, seed=13) * 0.02


TOKENS = torch.randint(VOCABULARY, (6, 12), generator=generator())


def tiny_llama(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(13)
    usual = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    return LlamaForCausalLM(LlamaConfig(**(usual | sizes))).eval()


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(13)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name:  # the biases of a new model are zero, which tests nothing
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator())
    return model


def uneven(model):
    """Norms and biases of a new model are ones and zeros, which test nothing."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator())
    return model


def tiny(name, **sizes):
    """A random model of any kind that transformers has a config for."""
    import transformers

    torch.manual_seed(13)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


OTHERS = {
    "Qwen2": {"intermediate_size": 96, "num_key_value_heads": 2},
    "Gemma2": {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "Phi": {"intermediate_size": 96},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "Bloom": {},
    "GPTNeoX": {"intermediate_size": 96},
    "Mistral": {"intermediate_size": 96, "num_key_value_heads": 2, "sliding_window": 4},
}
MODELS = {"Llama": tiny_llama, "GPT2": tiny_gpt2} | {
    name: lambda name=name: tiny(name, **OTHERS[name]) for name in OTHERS
}
"""A model of each architecture, by its name."""


def sharded(folder, make, dtype):
    """Writes a model in several files, with a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model = make().to(dtype)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


class Letters:
    """A tokenizer: a token for each of 100 characters."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(char) - 32 for char in text]}

    def decode(self, tokens):
        return "".join(chr(token + 32) for token in tokens)


def toy_model():
    """A random Llama that writes letters, and its tokenizer."""
    model = tiny_llama(intermediate_size=128)
    model.config.eos_token_id = None
    return model, Letters()


class Pattern(str):
    facts = ()


def says(*facts):
    """A pattern for `match=`: every fact, each as a word of its own, in any order.

    A message may then be worded better, but not lose the layer, the number or the name.
    """
    words = (rf"(?=[\s\S]*(?<!\w){re.escape(str(fact))}(?!\w))" for fact in facts)
    pattern = Pattern(r"\A" + "".join(words))
    pattern.facts = facts
    return pattern
