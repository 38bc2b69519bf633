"""Tiny random checkpoints of every family, made so that a mistake anywhere shows in the logits.

The idea: weights are drawn at scales that keep attention, every norm, the gates and the experts all of the same
weight in the residual stream, and the output head gives logits a standard deviation above 3. So a wrong rope,
a lost window or a forgotten renormalisation moves logits by whole units, while honest rounding moves them by
thousandths. Prompts are searched for: one is taken only if no greedy choice and no choice of experts along it is
close enough to a tie for honest rounding to flip it.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

# Largest absolute error a test may accept, in standard deviations of the logits (target Q2).
TOLERANCE_STD = 2e-3
# A deliberate mistake must move some logit by at least this many tolerances.
BREAKAGE_TOLERANCES = 20.0
# The best token leads the second by at least this many tolerances at each of the greedy steps.
MARGIN_TOLERANCES = 4.0
# The rounding of the integer combine, which our engine does and the yardstick does not, stays below this share.
ROUNDING_TOLERANCES = 0.35
# The last chosen expert leads the first refused by this much, in standard deviations of the gate's logits.
GATE_GAP_STD = 2e-3
LOGITS_STD_MIN = 3.0
PROMPT_TOKENS = 48
GREEDY_TOKENS = 64
# Greedy text that only repeats itself would test little.
GREEDY_DISTINCT_MIN = 16
CANDIDATES_PER_ROUND = 96
ROUNDS = 40
PROMPTS_PER_CHECKPOINT = 2
# 256 bytes, <|endoftext|>, <|im_start|>, <|im_end|> and five ids that no text has: not a multiple of 16.
VOCAB = 264
EOS = 258
# Scale of the experts' down projections: their share of the residual stream.
EXPERT_SCALE = 0.4


@dataclass
class Case:
    """One checkpoint: its folder, its config and what must not be got wrong in it."""

    name: str
    config: object
    breakages: list = field(default_factory=list)
    seed: int = 0
    shard_bytes: int | None = None


def cases():
    """Every checkpoint. Sizes are small and, in several, not multiples of 32, so that padding is exercised."""
    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=256,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    always = ["rope_theta", "rope_interleaved", "top_k", "gate_up_swapped", "kv_heads_interleaved"]
    qwen3 = dict(
        common,
        head_dim=32,
        intermediate_size=96,
        moe_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        use_sliding_window=False,
        rms_norm_eps=1e-6,
    )
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
    }
    qk = ["qk_norm_removed", "qk_norm_full_width"]
    return [
        Case("qwen3_moe", Qwen3MoeConfig(**qwen3, rope_parameters=rope), always + qk + ["renormalise"], 1),
        Case(
            "qwen3_moe-dense-tied",
            Qwen3MoeConfig(
                **dict(qwen3, num_hidden_layers=4, head_dim=16, tie_word_embeddings=True, moe_intermediate_size=32),
                decoder_sparse_step=2,
                mlp_only_layers=[3],
                rope_parameters=rope,
            ),
            always + qk,
            2,
        ),
        Case(
            "qwen3_moe-yarn",
            Qwen3MoeConfig(
                **dict(qwen3, hidden_size=80, norm_topk_prob=False, moe_intermediate_size=32),
                rope_parameters=yarn,
            ),
            always + qk + ["renormalise", "rope_scaling", "attention_factor"],
            3,
            shard_bytes=200_000,
        ),
        Case(
            "qwen2_moe",
            Qwen2MoeConfig(
                **common,
                intermediate_size=96,
                moe_intermediate_size=48,
                shared_expert_intermediate_size=72,
                num_experts=8,
                num_experts_per_tok=4,
                norm_topk_prob=False,
                use_sliding_window=False,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            ),
            always + ["renormalise", "qkv_bias", "shared_gate", "shared_expert"],
            4,
        ),
        Case(
            "qwen2_moe-window-linear",
            Qwen2MoeConfig(
                **dict(common, num_key_value_heads=1),
                intermediate_size=96,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=64,
                num_experts=9,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                use_sliding_window=True,
                sliding_window=11,
                max_window_layers=3,
                rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            ),
            [b for b in always if b != "kv_heads_interleaved"]
            + ["renormalise", "qkv_bias", "shared_gate", "window", "window_off_by_one", "rope_scaling"],
            5,
        ),
        Case(
            "mixtral",
            MixtralConfig(
                **dict(common, num_attention_heads=8, num_key_value_heads=2),
                head_dim=16,
                intermediate_size=40,
                num_local_experts=8,
                num_experts_per_tok=2,
                sliding_window=8,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            ),
            always + ["window", "window_off_by_one", "renormalise"],
            6,
        ),
        Case(
            "olmoe",
            OlmoeConfig(
                **dict(common, num_attention_heads=4, num_key_value_heads=4),
                intermediate_size=32,
                num_experts=12,
                num_experts_per_tok=4,
                norm_topk_prob=False,
                clip_qkv=1.25,
                rope_parameters=rope,
            ),
            [b for b in always if b != "kv_heads_interleaved"]
            + ["renormalise", "qk_norm_removed", "qk_norm_per_head", "clip_removed", "clip_before_norm"],
            7,
        ),
        Case(
            "olmoe-gqa",
            OlmoeConfig(
                **common,
                intermediate_size=48,
                num_experts=8,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                clip_qkv=None,
                rope_parameters=rope,
            ),
            always + ["renormalise", "qk_norm_removed", "qk_norm_per_head"],
            8,
        ),
    ]


@torch.no_grad()
def randomise(model, seed):
    """Draws every parameter anew, from a generator that does not depend on how transformers initialises."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape, std: torch.randn(shape, generator=generator) * std
    hidden = model.config.hidden_size
    tied = model.config.tie_word_embeddings
    for name, parameter in sorted(model.named_parameters()):
        shape = parameter.shape
        if "norm" in name:
            values = 0.6 + 0.8 * torch.rand(shape, generator=generator)
            if tied and name == "model.norm.weight":
                values = values * 2.5
        elif name.endswith(".bias"):
            values = normal(shape, 0.5)
        elif "embed_tokens" in name:
            values = normal(shape, 0.2 if tied else 1.0)
        elif "lm_head" in name:
            values = normal(shape, 4.0 / hidden**0.5)
        elif "shared_expert_gate" in name or name.endswith("mlp.gate.weight"):
            values = normal(shape, 1.5 / hidden**0.5)
        elif "o_proj" in name:
            values = normal(shape, 1.0 / shape[-1] ** 0.5)
        elif "experts.down_proj" in name:
            values = normal(shape, EXPERT_SCALE / shape[-1] ** 0.5)
        elif "down_proj" in name:
            values = normal(shape, 1.0 / shape[-1] ** 0.5)
        else:
            values = normal(shape, 1.0 / shape[-1] ** 0.5)
        parameter.copy_(values.to(torch.bfloat16))


def byte_tokenizer():
    """A tokenizer.json of 256 bytes and three special tokens: enough to talk to these checkpoints over HTTP."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Bytes in their printable stand-ins, in byte order (GPT-2's table; no merges, so every byte is a token).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    tokenizer = Tokenizer(models.BPE(vocab={stand_in[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def write_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    fast.save_pretrained(folder)


def old_spelling(config):
    """The same config in the spelling of transformers 4: rope_theta and rope_scaling, num_experts, torch_dtype."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope["rope_type"]
    old["rope_scaling"] = None if kind == "default" else rope
    if old["model_type"] != "mixtral" and "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.57.1"
    old.pop("layer_types", None)
    return old


def load(folder):
    """The checkpoint as the yardstick runs it: bf16 weights, float32 arithmetic, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    return model.float().eval()


def write(case, folder: Path):
    """Saves the checkpoint, its tokenizer and its config in both spellings."""
    config = copy.deepcopy(case.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, case.seed)
    model = model.to(torch.bfloat16)
    shard = {"max_shard_size": case.shard_bytes} if case.shard_bytes else {}
    model.save_pretrained(folder, **shard)
    write_tokenizer(folder)
    saved = json.loads((folder / "config.json").read_text())
    old = folder / "config.transformers4.json"
    old.write_text(json.dumps(old_spelling(saved), indent=2) + "\n")
    # The yardstick itself must read both spellings as one config.
    reread, meant = AutoConfig.from_pretrained(old).to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    changed = {key for key in meant if meant[key] != reread.get(key)} - {"transformers_version", "_name_or_path"}
    assert not changed, f"{case.name}: the old spelling reads differently: {changed}"


class Gaps:
    """Watches the gates: how near each choice of experts came to a tie."""

    def __init__(self, model):
        self.gaps, self.hooks = [], []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                self.hooks.append(module.register_forward_hook(self.watch))

    def watch(self, module, _inputs, outputs):
        logits = outputs[0].float()
        best = logits.sort(dim=-1, descending=True).values
        gap = best[:, module.top_k - 1] - best[:, module.top_k]
        self.gaps.append(gap / logits.std())

    def take(self, batch):
        """Smallest gap of each sequence since the last call."""
        smallest = torch.stack([gap.view(batch, -1).min(dim=1).values for gap in self.gaps]).min(dim=0).values
        self.gaps = []
        return smallest

    def close(self):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def greedy(model, prompts, count):
    """`count` greedy tokens, the margins of each choice and the smallest gate gap, per prompt."""
    gaps = Gaps(model)
    output = model(prompts, use_cache=True)
    tokens, margins, smallest = [], [], gaps.take(len(prompts))
    for step in range(count):
        best = output.logits[:, -1].topk(2, dim=-1)
        tokens.append(best.indices[:, :1])
        margins.append(best.values[:, 0] - best.values[:, 1])
        if step + 1 < count:
            output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
            smallest = torch.minimum(smallest, gaps.take(len(prompts)))
    gaps.close()
    return torch.cat(tokens, dim=1), torch.stack(margins, dim=1), smallest


@torch.no_grad()
def choose_prompts(model, seed, log):
    """The first prompts that pass every check, with their greedy continuation."""
    generator = torch.Generator().manual_seed(1000 + seed)
    chosen = []
    for _ in range(ROUNDS):
        prompts = torch.randint(0, 256, (CANDIDATES_PER_ROUND, PROMPT_TOKENS), generator=generator)
        std = model(prompts[:8]).logits.std().item()
        tokens, margins, gaps = greedy(model, prompts, GREEDY_TOKENS)
        for row in range(CANDIDATES_PER_ROUND):
            distinct = len(set(tokens[row].tolist()))
            steady = margins[row].min().item() >= 2 * MARGIN_TOLERANCES * TOLERANCE_STD * std
            if steady and gaps[row].item() >= GATE_GAP_STD and distinct >= GREEDY_DISTINCT_MIN:
                chosen.append((prompts[row].tolist(), tokens[row].tolist(), gaps[row].item()))
        log(f"    {len(chosen)} of {PROMPTS_PER_CHECKPOINT} prompts, best gap {gaps.max():.1e}")
        if len(chosen) >= PROMPTS_PER_CHECKPOINT:
            return chosen[:PROMPTS_PER_CHECKPOINT]
    raise SystemExit("no prompt without near-ties found: change the seed of this checkpoint")
