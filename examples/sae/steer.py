"""Loads an autoencoder, shows which features a text activates most, and generates with one of them turned up.

python examples/sae/steer.py --model HuggingFaceTB/SmolLM2-135M --saes out/saes --hookpoint layers.10
"""

from argparse import ArgumentParser

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradtools.sae import SAE
from hf_gradtools.sae.hookpoints import run
from hf_gradtools.sae.interventions import steer


parser = ArgumentParser(description="Generate with a feature of a sparse autoencoder turned up.")
parser.add_argument("--model", required=True, help="Hub id or folder of the causal LM")
parser.add_argument("--saes", required=True, help="Hub id or folder of autoencoders")
parser.add_argument("--hookpoint", default="layers.0")
parser.add_argument("--text", default="The weather in Paris is", help="what features are taken from, and continued")
parser.add_argument("--feature", type=int, help="default: the one that the text's last token activates most")
parser.add_argument("--strength", type=float, default=2.0, help="in lengths of the last token's hidden state")
parser.add_argument("--max_new_tokens", type=int, default=20)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model).eval()
sae = SAE.from_pretrained(options.saes, hookpoint=options.hookpoint)

inputs = tokenizer(options.text, return_tensors="pt", return_token_type_ids=False)
hidden_states = run(model, [options.hookpoint], **inputs)[options.hookpoint]  # [1, tokens, d_in]
with torch.no_grad():
    latents = sae.encode(hidden_states.float())[0]  # [tokens, d_sae]
for token, row in zip(inputs["input_ids"][0], latents, strict=True):
    strongest = ", ".join(f"{feature} ({row[feature]:.2f})" for feature in row.topk(3).indices.tolist())
    print(f"{tokenizer.decode(token)!r}: features {strongest}")

feature = int(latents[-1].argmax()) if options.feature is None else options.feature
strength = options.strength * float(hidden_states[0, -1].float().norm())
settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
print("plain:  ", tokenizer.decode(model.generate(**inputs, **settings)[0]))
with steer(model, sae, feature, strength):
    print(f"feature {feature}:", tokenizer.decode(model.generate(**inputs, **settings)[0]))
