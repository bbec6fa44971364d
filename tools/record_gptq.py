"""Measures what notebook 06 tells of the whole model, and records it in data/results.json.

    python tools/record_gptq.py methods [NAME...]     the methods side by side, on the same tokens
    python tools/record_gptq.py amounts [COUNT...]    GPTQ after 1 to 128 calibration sequences

Each result is recorded as soon as it is there, under "notebooks/06"; names or counts repeat some
of them. All of it takes about a quarter of an hour on two cores. Times are not measured here:
`make bench-peers` does that.
"""

import argparse
import tempfile

import torch
from tqdm import tqdm

from chapter13 import corpus, evaluate, models, quantize_model, results
from chapter13.whole_model.linear import QuantizedLinear

KEY = "notebooks/06"
EVALUATION = (8, 256)  # sequences, length
CALIBRATION = (16, 256)
AMOUNTS = (1, 4, 16, 64, 128)

METHODS = {  # name -> how quantize_model is called
    "round to nearest": {"method": "affine"},
    "NF4": {"method": "nf4"},
    "GPTQ": {"method": "gptq"},
    "GPTQ, clip search": {"method": "gptq", "clip_search": True},
    "AWQ": {"method": "awq"},
}
LEARNED = ("gptq", "awq")


def calibration(tokenizer, source: str, sequences: int) -> torch.Tensor:
    """Calibration tokens: of "news", or of "encyclopedia" articles that evaluation never sees."""
    length = CALIBRATION[1]
    if source == "news":
        return corpus.calibration_tokens(tokenizer, sequences, length)
    return corpus.encyclopedia_tokens(tokenizer, sequences, length, "calibration")


class Reference:
    """The evaluation tokens, and the full-precision model's predictions for them."""

    def __init__(self, folder: str):
        model, self.tokenizer = models.load(device="cpu")
        self.tokens = corpus.evaluation_tokens(self.tokenizer, *EVALUATION)
        self.reference = evaluate.cache_logits(model, self.tokens, f"{folder}/reference")
        self.perplexity = evaluate.perplexity(model, self.tokens).value

    def measure(self, calibration_tokens=None, **options) -> dict:
        """Quantizes the model in groups of 64 and 4 bits, and says what that cost."""
        model, _ = models.load(device="cpu")
        quantize_model(model, bits=4, group_size=64, calibration=calibration_tokens, **options)
        kl = evaluate.kl_divergence(model, self.reference, self.tokens)
        low, high = kl.interval
        layers = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
        weights = sum(each.shape.numel() for each in layers)
        return {
            "kl": round(kl.value, 4),
            "interval": [round(low, 4), round(high, 4)],
            "perplexity": round(evaluate.perplexity(model, self.tokens).value, 2),
            "bits_per_weight": round(8 * sum(each.nbytes for each in layers) / weights, 3),
        }


def keep(part: str, name: str, measured, setting: dict) -> None:
    """Puts one result into its part of the record."""
    record = results.load().get(KEY, {}) | setting
    record[part] = record.get(part, {}) | {name: measured}
    results.record(KEY, record, ("transformers",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["methods", "amounts"])
    parser.add_argument("only", nargs="*", help="names of methods, or counts of sequences")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        yardstick = Reference(folder)
        setting = {
            "evaluation": EVALUATION,
            "calibration": CALIBRATION,
            "perplexity": round(yardstick.perplexity, 2),
        }
        if args.part == "methods":
            for name in tqdm(args.only or METHODS):
                options = METHODS[name]
                tokens = None
                if options["method"] in LEARNED:
                    tokens = calibration(yardstick.tokenizer, "news", CALIBRATION[0])
                keep("methods", name, yardstick.measure(tokens, **options), setting)
            return
        for count in tqdm([int(word) for word in args.only] or AMOUNTS):
            for source in ("news", "encyclopedia"):
                tokens = calibration(yardstick.tokenizer, source, count)
                measured = yardstick.measure(tokens, method="gptq", clip_search=True)
                keep("amounts", f"{count} {source}", measured, setting)


if __name__ == "__main__":
    main()
