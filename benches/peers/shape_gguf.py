#!/usr/bin/env python3
"""Writes a GGUF file of random 4-bit weights (Q4_0) in the shape of Qwen3-30B-A3B, for timing llama.cpp.

    shape_gguf.py FILE [--layers 12]

The shape and the bits per weight are those of `synthetic:qwen3-30b-a3b`, so both programs read the same number of bytes
per token. Values are noise: only time means anything. Needs `pip install gguf numpy`.
"""

import argparse

import gguf
import numpy

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
EXPERTS, USED, WIDTH, VOCAB = 128, 8, 768, 151936


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    random = numpy.random.default_rng(1)
    out = gguf.GGUFWriter(options.file, "qwen3moe")
    describe(out, options.layers)

    def quantized(name: str, *shape: int) -> None:
        # A block of Q4_0: one f16 scale, then 32 nibbles.
        blocks = numpy.empty((int(numpy.prod(shape)) // 32, 18), numpy.uint8)
        blocks[:, 2:] = random.integers(0, 256, (len(blocks), 16), dtype=numpy.uint8)
        blocks[:, :2] = numpy.full((len(blocks), 1), 0.004, numpy.float16).view(numpy.uint8)
        bytes_per_row = shape[-1] // 32 * 18
        out.add_tensor(name, blocks.reshape(*shape[:-1], bytes_per_row), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def floats(name: str, *shape: int, around: float = 0.0) -> None:
        out.add_tensor(name, (random.standard_normal(shape) * 0.02 + around).astype(numpy.float32))

    quantized("token_embd.weight", VOCAB, HIDDEN)
    quantized("output.weight", VOCAB, HIDDEN)
    floats("output_norm.weight", HIDDEN, around=1.0)
    for layer in range(options.layers):
        block = f"blk.{layer}."
        floats(block + "attn_norm.weight", HIDDEN, around=1.0)
        floats(block + "ffn_norm.weight", HIDDEN, around=1.0)
        floats(block + "attn_q_norm.weight", HEAD_DIM, around=1.0)
        floats(block + "attn_k_norm.weight", HEAD_DIM, around=1.0)
        quantized(block + "attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        quantized(block + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        quantized(block + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        quantized(block + "attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        floats(block + "ffn_gate_inp.weight", EXPERTS, HIDDEN)
        quantized(block + "ffn_gate_exps.weight", EXPERTS, WIDTH, HIDDEN)
        quantized(block + "ffn_up_exps.weight", EXPERTS, WIDTH, HIDDEN)
        quantized(block + "ffn_down_exps.weight", EXPERTS, HIDDEN, WIDTH)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def describe(out: gguf.GGUFWriter, layers: int) -> None:
    out.add_name("shape-a")
    out.add_block_count(layers)
    out.add_context_length(4096)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(6144)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_key_length(HEAD_DIM)
    out.add_value_length(HEAD_DIM)
    out.add_rope_freq_base(1e6)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_expert_count(EXPERTS)
    out.add_expert_used_count(USED)
    out.add_expert_feed_forward_length(WIDTH)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list([f"tok{index}" for index in range(VOCAB)])
    out.add_token_types([1] * VOCAB)
    out.add_token_merges(["a b"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)


if __name__ == "__main__":
    main()
