"""A tokenizer of bytes and a few merges, and small random causal LMs that end lines now and then."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = ["Question: which town is it?\nAnswer: Paris\n\n", "Is it True or False? It is: True", "It is: False"]
POSITIONS = 256


@cache
def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokens.train_from_iterator(WORDS * 3, trainer)
    if bos:
        tokens.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")


def build(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer()), "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=POSITIONS, **sizes)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=POSITIONS, **sizes,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        newline = tokenizer()("\n")["input_ids"][0]
        model.get_output_embeddings().weight[newline] *= 3
    return model.to(dtype).eval()


@cache
def model(kind: str = "llama") -> torch.nn.Module:
    """One in double precision that tests share and leave as it is."""
    return build(kind)
