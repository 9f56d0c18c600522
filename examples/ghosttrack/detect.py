"""Asks a hallucination detector about answers; with `--fit`, makes it of labelled ones first.

python examples/ghosttrack/detect.py --detector user/detector --question "Who wrote Faust?" --answer Goethe
"""

from argparse import ArgumentParser
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_gradtools  # noqa: F401 (its import makes the pipeline known)
from hf_gradtools.ghosttrack import DetectorConfig, HallucinationDetector
from hf_gradtools.sae import load_many
from hf_gradtools.workflow.data import load_rows


parser = ArgumentParser(description="Say how likely answers are made up.")
parser.add_argument("--detector", required=True, help="Hub id or folder; with --fit the folder to make")
parser.add_argument("--question", action="append", default=[], help="repeatable, each with its --answer")
parser.add_argument("--answer", action="append", default=[])
parser.add_argument("--plots", type=Path, default=Path("out/plots"), help="folder for the drawings of tracks")
parser.add_argument("--fit", help="file of rows with question, answer and label (1 = made up)")
parser.add_argument("--model", help="with --fit: Hub id or folder of the causal LM")
parser.add_argument("--saes", help="with --fit: Hub id or folder of its autoencoders")
options = parser.parse_args()

if options.fit:
    rows = load_rows(options.fit)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    config = DetectorConfig(model_name=options.model)
    detector = HallucinationDetector(config, load_many(options.saes), model, tokenizer)
    reading = detector.read(list(rows))
    detector.fit(reading, rows["label"][:], rows["question"][:])
    detector.evaluate(reading, rows["label"][:], rows["question"][:])
    detector.save_pretrained(options.detector)  # with a card that has these numbers
    auroc = detector.config.metrics["table"][0]["auroc"]
    print("AUROC {estimate:.3f} [{low:.3f}, {high:.3f}] on questions left out".format(**auroc))

detect = pipeline("hallucination-detection", model=options.detector)
options.plots.mkdir(parents=True, exist_ok=True)
for number, (question, answer) in enumerate(zip(options.question, options.answer, strict=True)):
    found = detect({"question": question, "answer": answer})
    plot = options.plots / f"tracks-{number}.svg"
    plot.write_text(found["plot"])
    print(f"{found['probability']:.3f} {found['label']}: {question} {answer}  ({plot})")
