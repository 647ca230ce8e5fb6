#!/usr/bin/env python3
"""Parity fixtures: what transformers' own models compute, for train_gpt_cpu to be held against.

usage: make_fixtures.py [NAME ...]        writes dev/test/fixtures/NAME/, all of them by default
       FIXTURES=DIR make_fixtures.py ...  writes DIR/NAME/ instead

For each small random model: its checkpoint in fp32 and, from those weights, the logits, the loss, every
gradient, ten AdamW steps and the weights after them. The arithmetic is float64 throughout and the results
are rounded to fp32 once, so an expected value is the truth to fp32 rounding and a comparison measures the
error of one side only. The README beside the fixtures lists their tensors and how to compare.
Two runs with the packages of requirements.txt write the same bytes.
"""

import json
import os
import pathlib
import struct
import sys
import zlib

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode

# grad_clip lies among the gradient norms, so that steps with and without clipping occur. eps is large
# because Adam divides a gradient by its own size: where the true gradient is zero (the bias of GPT-2's keys),
# rounding noise of 1e-9 beside the usual 1e-8 would become a step of its own.
OPTIMIZER = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1,
             "grad_clip": 3.0}
STEPS = 10
BATCH = 2

# Each row: the model class, what its config sets, T, and (optional) the first position of every document in
# each sequence. Sizes are awkward on purpose: odd vocabularies, head_dim 10, head_dim != hidden / heads.
GPT2 = ("GPT2LMHeadModel", dict(vocab_size=97, n_positions=32, n_embd=40, n_layer=2, n_head=4), 24)
LLAMA_GQA = ("LlamaForCausalLM", dict(
    vocab_size=101, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=500000.0,
    # Wavelengths, 2 pi 500000^(i/8), are 6.3, 32, 167 ...: kept below 64/4, divided above 64, else blended.
    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=64), tie_word_embeddings=True), 40)
FIXTURES = {
    "gpt2": GPT2,
    "gpt2_untied": ("GPT2LMHeadModel", dict(
        vocab_size=130, n_positions=16, n_embd=32, n_layer=2, n_head=2, n_inner=72, layer_norm_epsilon=1e-3,
        tie_word_embeddings=False), 16),
    "gpt2_documents": GPT2 + ([[0, 7, 8, 19], [0, 16]],),
    "llama_mha": ("LlamaForCausalLM", dict(
        vocab_size=96, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0), 20),
    "llama_gqa": LLAMA_GQA,
    "llama_bias": ("LlamaForCausalLM", dict(
        vocab_size=99, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-2, rope_theta=1000.0,
        attention_bias=True, mlp_bias=True), 33),
    "llama_documents": LLAMA_GQA + ([[0, 1, 18, 32], [0, 25]],),
    "mistral": ("MistralForCausalLM", dict(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None), 16),
    "qwen2": ("Qwen2ForCausalLM", dict(
        vocab_size=111, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1000000.0,
        use_sliding_window=False, tie_word_embeddings=True), 17),
}


class AllDouble(TorchFunctionMode):
    """Turns every request for float32 into one for float64.

    transformers computes RMSNorm, RoPE and the softmax in float32 whatever the model's type; left alone, the
    expected values would carry the rounding errors that they are there to measure.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def randomise(model, rng):
    """Gives every parameter values that show when it is dropped or misread: no biases of 0, no norms of 1."""
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(tuple(parameter.shape))
        norm_weight = parameter.dim() == 1 and name.endswith("weight")
        value = 1 + 0.3 * noise if norm_weight else 0.2 * noise
        parameter.data.copy_(torch.from_numpy(value))


def restrict_attention(model, doc_start):
    """doc_start (B, T) -> the argument that keeps attention causal and within the document.

    GPT-2's eager attention takes no mask of that shape, but reads its causal one from a buffer per layer."""
    T = doc_start.shape[1]
    key = torch.arange(T)
    allowed = ((key[None, :] <= key[:, None]) & (key >= doc_start[:, :, None]))[:, None]  # (B, 1, T, T)
    if model.config.model_type != "gpt2":
        mask = torch.zeros(allowed.shape, dtype=torch.float64)
        return {"attention_mask": mask.masked_fill(~allowed, torch.finfo(torch.float64).min)}
    for block in model.transformer.h:
        block.attn.bias = allowed
    return {}


def fp32(tensor):
    return tensor.detach().numpy().astype(np.float32)


def train(model, tokens, targets, extra):
    """The expected tensors: forward, backward, then STEPS steps on the same batch."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2],
               "weight_decay": OPTIMIZER["weight_decay"]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER["learning_rate"], eps=OPTIMIZER["eps"],
                                  betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]))
    expected, losses, norms = {}, [], []
    for step in range(STEPS):
        logits = model(tokens, use_cache=False, **extra).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            expected.update({"logits": fp32(logits), "loss": fp32(loss.reshape(1))})
            expected.update({"grad." + name: fp32(p.grad) for name, p in model.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["grad_clip"]).item())
        losses.append(loss.item())
        optimizer.step()
    expected.update({"losses": np.array(losses, np.float32), "grad_norm": np.array(norms, np.float32)})
    expected.update({"after." + name: fp32(p) for name, p in model.named_parameters()})
    return expected


def sort_metadata(path):
    """Rewrites a safetensors header in one fixed order: the package writes the metadata in a random one."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(data[:8] + text + data[8 + size:])


def make(name, directory):
    architecture, settings, T, *documents = FIXTURES[name]
    rng = np.random.default_rng(zlib.crc32(json.dumps([architecture, settings, T]).encode()))
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**settings, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    if config.model_type == "gpt2":  # the one with dropout unless told otherwise
        config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = 0.0
    saved = model_class(config)
    randomise(saved, rng)
    saved.save_pretrained(directory)
    (directory / "generation_config.json").unlink()

    V = settings["vocab_size"]
    sampled = torch.from_numpy(rng.integers(0, V, (BATCH, T + 1)))
    tokens, targets = sampled[:, :-1], sampled[:, 1:]
    expected = {"tokens": tokens.numpy().astype(np.int32), "targets": targets.numpy().astype(np.int32)}
    with AllDouble():
        model = model_class(config).double()  # built in here, so that the RoPE frequencies are double too
        model.load_state_dict(saved.state_dict())
        extra = {}
        if documents:
            starts = torch.zeros(BATCH, T, dtype=torch.int64)
            for row, positions in zip(starts, documents[0]):
                for position in positions:
                    row[position:] = position
            expected["doc_start"] = starts.numpy().astype(np.int32)
            extra = restrict_attention(model, starts)
        expected.update(train(model.eval(), tokens, targets, extra))
    metadata = {key: repr(value) for key, value in OPTIMIZER.items()}
    metadata.update({"torch": torch.__version__, "transformers": transformers.__version__})
    save_file({key: np.ascontiguousarray(value) for key, value in expected.items()},
              directory / "expected.safetensors", metadata)
    sort_metadata(directory / "expected.safetensors")
    size = sum(file.stat().st_size for file in directory.iterdir()) // 1024
    norms = expected["grad_norm"]
    print(f"{name:16s} {sum(p.numel() for p in model.parameters()):6d} parameters {size:4d} kB   "
          f"loss {expected['losses'][0]:.4f} -> {expected['losses'][-1]:.4f}   "
          f"gradient norm {norms.min():.3f} .. {norms.max():.3f}")


def main():
    unknown = [name for name in sys.argv[1:] if name not in FIXTURES]
    if unknown:
        sys.exit(f"make_fixtures.py: no fixture {unknown[0]!r}; there are: {', '.join(FIXTURES)}")
    torch.set_num_threads(1)  # the order of sums, and so the bytes, must not depend on the machine
    root = pathlib.Path(os.environ.get("FIXTURES", pathlib.Path(__file__).parent / "fixtures"))
    for name in sys.argv[1:] or FIXTURES:
        (root / name).mkdir(parents=True, exist_ok=True)
        make(name, root / name)


if __name__ == "__main__":
    main()
