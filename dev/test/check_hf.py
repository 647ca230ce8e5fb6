#!/usr/bin/env python3
"""Opens a model directory written by train_gpt_cpu in transformers and compares what both compute.

usage: check_hf.py DIR LOGITS.safetensors

LOGITS holds tokens (B, T) I32 and logits (B, T, V) F32. Exits 0 when transformers reports no missing,
unexpected or misshapen tensor, its fp32 logits differ by less than 1e-5 of the largest one, and the
tokenizer, where there is one, opens and gives a sentence back.
"""

import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

TOLERANCE = 1e-5
SENTENCE = "It is a truth universally acknowledged, that 1,234 naïve  spaces\tand\nlines — 東京 🙂 — come back."


def check_model(directory, logits_file):
    """Returns the faults found."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    faults = [f"{kind}: {sorted(map(str, names))}" for kind, names in report.items() if names]
    ours = load_file(logits_file)
    tokens, logits = ours["tokens"].long(), ours["logits"].double()
    with torch.no_grad():
        theirs = model.eval()(tokens, use_cache=False).logits.double()
    if logits.shape != theirs.shape:
        return faults + [f"logits have shape {tuple(logits.shape)}, transformers gives {tuple(theirs.shape)}"]
    error = ((logits - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters())} parameters, "
          f"{tuple(logits.shape)} logits, max relative error {error:.1e} (limit {TOLERANCE:.0e})")
    if not error < TOLERANCE:  # also when it is not a number
        faults.append(f"logits differ by {error:.1e}")
    return faults


def check_tokenizer(directory):
    """Returns the faults found: AutoTokenizer must agree with the file as it stands, and lose nothing."""
    alone = Tokenizer.from_file(str(directory / "tokenizer.json"))
    file_ids = alone.encode(SENTENCE, add_special_tokens=False).ids
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    vocab_size = transformers.AutoConfig.from_pretrained(directory).vocab_size
    print(f"{type(tokenizer).__name__}: {len(tokenizer)} tokens, the sentence takes {len(ids)}")
    faults = []
    if ids != file_ids:
        faults.append(f"AutoTokenizer gives {ids}, tokenizer.json alone {file_ids}")
    if text != SENTENCE:
        faults.append(f"the sentence came back as {text!r}")
    if len(tokenizer) > vocab_size:
        faults.append(f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}")
    return faults


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    directory = pathlib.Path(sys.argv[1])
    faults = check_model(directory, sys.argv[2])
    if (directory / "tokenizer.json").exists():
        faults += check_tokenizer(directory)
    for fault in faults:
        print(f"check_hf.py: {directory}: {fault}", file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
