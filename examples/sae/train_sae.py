"""Trains sparse autoencoders of some layers of any causal LM, all in one pass over the texts.

python examples/sae/train_sae.py --model HuggingFaceTB/SmolLM2-135M --dataset texts.jsonl --hookpoints layers.10
"""

from argparse import ArgumentParser

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradtools import ModelActivations, SAEConfig, SAETrainer, SAETrainingConfig, token_blocks
from hf_gradtools.sae import hold_out_tokens


parser = ArgumentParser(description="Train sparse autoencoders of a causal LM's hidden states.")
parser.add_argument("--model", required=True, help="Hub id or folder of a causal LM")
parser.add_argument("--dataset", required=True, help="texts: Hub id (id or id:config), .jsonl, .csv, .parquet or .txt")
parser.add_argument("--output_dir", default="out/saes")
parser.add_argument("--hookpoints", nargs="+", default=["layers.0"])
parser.add_argument("--d_sae", type=int, default=4096, help="features of each autoencoder")
parser.add_argument("--k", type=int, default=32, help="active features of a token")
parser.add_argument("--context_length", type=int, default=256)
parser.add_argument("--max_tokens", type=int, default=1_000_000)
parser.add_argument("--batch_tokens", type=int, default=2048)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
sequences = token_blocks(options.dataset, tokenizer, options.context_length, max_tokens=options.max_tokens)
activations, held_out = hold_out_tokens(ModelActivations(model, sequences, options.hookpoints), share=0.05)

width = activations.d_in(options.hookpoints[0])
config = SAEConfig(d_in=width, d_sae=options.d_sae, k=options.k, model_name=options.model)
args = SAETrainingConfig(options.output_dir, batch_tokens=options.batch_tokens)
saes = SAETrainer(config, activations, args, eval_source=held_out).train(resume=True)

for hookpoint, sae in saes.items():
    figures = sae.config.metadata["evaluation"]
    print(f"{options.output_dir}/{hookpoint}: FVU {figures['fvu']:.3f}, dead {figures['dead_fraction']:.1%}")
