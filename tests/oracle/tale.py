"""Golden values of the demo model, models/tale-moe: greedy text, logits, perplexity, tokenizer."""

import hashlib
import json
import math

import torch
from transformers import PreTrainedTokenizerFast

import breakage
import checkpoints

# The first three whose greedy text has no near-tie are taken, the last of them a chat.
PROMPTS = [
    "Once upon a time there was a little girl who lived in a house by the sea. Every morning she",
    "The old king called his three sons before him, and said: \"Whoever of you brings me the golden apple that grows",
    "It was a cold and stormy night, and the wind was howling round the house, when there came a knock at the door",
    "\"I don't believe a word of it,\" said the Cat, and she walked away into the wood with her tail in the air.",
    "In a far country there lived a poor woodcutter, who had seven children and nothing to give them to eat. One day",
    "The Fairy looked at the Prince for a long time without speaking; then she took a small ring from her finger",
]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CHAT_CANDIDATES = 40
# Logits of every sixth position keep the file small; each position's logits depend on all before it anyway.
LOGITS_STRIDE = 6
WINDOW = 512
WINDOWS = 4

TEXTS = {
    "empty": "",
    "plain": "The quick brown fox jumps over the lazy dog.",
    "leading_space": " and then she said",
    "spaces": "a  b   c    d\t\te\n\n\nf \n g ",
    "newlines": "\r\nline one\r\nline two\n\n",
    "quotes": "\"'Tis a fine day,\" said the fox; \"isn't it? We'll see, I'd say they've gone.\"",
    "numbers": "In 1984 there were 1,234,567.89 apples at 3.5% of $20 (or 007).",
    "accents": "Café naïve façade Ærøskøbing Łódź",
    "combining": "e\u0301 a\u0308 n\u0303 and the composed é ä ñ",
    "cyrillic": "Жили-были старик со старухой.",
    "cjk": "昔々、あるところにおじいさんとおばあさんがいました。",
    "arabic": "كان يا ما كان في قديم الزمان",
    "devanagari": "एक समय की बात है",
    "emoji": "A fox 🦊 and a hare 🐇 went 🚶‍♀️ home 🏠!",
    "emoji_family": "👨‍👩‍👧‍👦 👍🏽 🇫🇷",
    "zero_width": "a\u200bb\u200dc\ufeffd",
    "controls": "bell\u0007 null-free \u001b[0m end",
    "code": "fn main() {\n    let x: Vec<u8> = vec![0; 16];\n\tprintln!(\"{x:?}\");\n}\n",
    "url": "see https://example.org/a/b?c=d&e=f#g",
    "special_in_text": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "special_almost": "<|im_start|user> <|im_end <|endoftext",
    "long_word": "Donaudampfschifffahrtsgesellschaft" * 3,
    "astral": "𝔗𝔥𝔢 𝒇𝒐𝒙 𓀀",
    "nbsp": "a\u00a0b\u2003c\u3000d",
}


def replacement_free_stream(tokenizer, ids):
    """What a reader may be shown after each token: the decoded prefix, held back where a code point is incomplete.

    A code point that the end of the list leaves incomplete is shown as U+FFFD by the last step.
    """
    shown, steps = "", []
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        last = count == len(ids)
        delta = text[len(shown) :] if last or not text.endswith("\ufffd") else ""
        shown += delta
        steps.append(delta)
    return steps


def tokenizer_cases(tokenizer):
    cases = []
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        kept = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stream = replacement_free_stream(tokenizer, ids)
        assert "".join(stream) == decoded, name
        cases.append(
            {
                "name": name,
                "text": text,
                "ids": ids,
                "decoded": decoded,
                "decoded_with_special": kept,
                "stream": stream,
            }
        )
    # Token lists that no text gives: cut code points and lone continuation bytes must not end the process.
    for name in ("emoji", "cjk", "astral"):
        ids = tokenizer.encode(TEXTS[name], add_special_tokens=False)
        for cut in (ids[:-1], ids[1:]):
            decoded = tokenizer.decode(cut, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cases.append({"name": f"{name}_cut", "text": None, "ids": cut, "decoded": decoded})
    return cases


@torch.no_grad()
def perplexity(model, ids):
    """Consecutive windows, every token but a window's first scored: the protocol of the model's README."""
    total, scored, per_window = 0.0, 0, []
    for start in range(0, WINDOW * WINDOWS, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        logits = model(window).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        per_window.append(losses.mean().item())
        total, scored = total + losses.sum().item(), scored + len(losses)
    return {
        "window": WINDOW,
        "windows": WINDOWS,
        "tokens": scored,
        "perplexity": math.exp(total / scored),
        "mean_loss_per_window": per_window,
    }


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


def choose(model, tokenizer, prompts, count, log):
    """Greedy text for the first `count` prompts along which nothing is nearly a tie."""
    golden = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        tokens, _, gap = checkpoints.greedy(model, torch.tensor([ids]), checkpoints.GREEDY_TOKENS)
        tokens = tokens[0].tolist()
        logits = logits_of(model, ids + tokens)
        best = logits[len(ids) - 1 : -1].topk(2, dim=-1)
        assert best.indices[:, 0].tolist() == tokens
        margins = best.values[:, 0] - best.values[:, 1]
        tolerances = margins.min().item() / (checkpoints.TOLERANCE_STD * logits.std().item())
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        log(f"    margin {tolerances:.1f} tolerances, gate gap {gap.item():.1e}: {text[:60]!r}")
        if tolerances >= checkpoints.MARGIN_TOLERANCES:
            golden.append(
                {
                    "prompt": prompt,
                    "prompt_ids": ids,
                    "greedy": tokens,
                    "greedy_text": text,
                    "greedy_margins": [round(value, 5) for value in margins.tolist()],
                    "gate_gap_std_min": gap.item(),
                }
            )
        if len(golden) == count:
            return golden
    raise SystemExit("too few prompts without near-ties: add some")


def chats(source):
    """Sentences of the held-out text, each as what a user says."""
    lines = (source / "valid.txt").read_text(encoding="utf-8").splitlines()
    sentences = [line.strip() for line in lines if 50 <= len(line.strip()) <= 140 and line.strip()[-1] in ".!?"]
    return [CHAT.format(sentence) for sentence in sentences[:: len(sentences) // CHAT_CANDIDATES]]


def make(root, fixtures, log):
    source, target = root / "models" / "tale-moe", fixtures / "tale-moe"
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = checkpoints.load(source)
    log("tale-moe: greedy text")
    golden = choose(model, tokenizer, PROMPTS, 2, log) + choose(model, tokenizer, chats(source), 1, log)
    first = logits_of(model, golden[0]["prompt_ids"] + golden[0]["greedy"])
    positions = list(range(0, len(first), LOGITS_STRIDE))
    kept = first[positions].contiguous()
    std = first.std().item()
    (target / "logits.f32").write_bytes(kept.numpy().astype("<f4").tobytes())
    text = torch.tensor([golden[0]["prompt_ids"] + golden[0]["greedy"]])
    rounded = breakage.combine_rounding(model, text)[0]
    cached = breakage.cache_rounding(model, text, torch.float16)[0]
    off = lambda other: round((other - first).abs().max().item() / (checkpoints.TOLERANCE_STD * std), 3)
    rounding = {"combine": off(rounded), "cache_f16": off(cached)}
    log(f"    std {std:.2f}, rounding {rounding}")
    log("tale-moe: perplexity")
    valid = (source / "valid.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(valid, add_special_tokens=False)
    measured = perplexity(model, ids)
    log(f"    {measured['perplexity']:.4f} over {measured['tokens']} of {len(ids)} tokens")
    facts = {
        "weights_sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest(),
        "logits_std": std,
        "tolerance": checkpoints.TOLERANCE_STD * std,
        "logits": {
            "file": "logits.f32",
            "shape": list(kept.shape),
            "layout": "[position][token] of the first prompt followed by its greedy tokens",
            "positions": positions,
        },
        "rounding_in_tolerances": rounding,
        "golden": golden,
        "perplexity": measured,
        "valid_ids_first": ids[: WINDOW * WINDOWS],
        "valid_ids_total": len(ids),
    }
    (target / "golden.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    cases = {"cases": tokenizer_cases(tokenizer)}
    (target / "tokenizer-cases.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
