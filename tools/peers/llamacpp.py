"""Runs a GGUF file in llama.cpp; tools/llamacpp.py starts it in a separate environment.

    python llamacpp.py MODEL.gguf TOKENS.npy OUTPUT.npz NEW

TOKENS.npy: int64 (sequences, length). Writes `logits`, float32 (sequences, length, vocabulary), and
`greedy`, int64 (sequences, NEW): each sequence continued with its likeliest tokens. Needs only
llama-cpp-python and NumPy.
"""

import sys

import llama_cpp
import numpy as np


def main(path, tokens, output, new):
    tokens = np.load(tokens)
    length = tokens.shape[1]
    model = llama_cpp.Llama(
        path,
        n_ctx=length + int(new),
        n_batch=length,
        logits_all=True,
        verbose=False,
        # keys and values in float32, as in torch: only the multiplication by weights differs
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    logits, greedy = [], []
    for sequence in tokens.tolist():
        model.reset()
        model.eval(sequence)
        logits.append(model.scores[:length].copy())
        written = [int(logits[-1][-1].argmax())]
        while len(written) < int(new):
            model.eval(written[-1:])
            written.append(int(model.scores[model.n_tokens - 1].argmax()))
        greedy.append(written)
    np.savez(output, logits=np.stack(logits), greedy=np.array(greedy))


if __name__ == "__main__":
    main(*sys.argv[1:])
