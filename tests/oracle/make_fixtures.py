"""Makes tests/fixtures/: what the yardstick (Hugging Face transformers) says, for tests that never run Python.

    python tests/oracle/make_fixtures.py              # everything
    python tests/oracle/make_fixtures.py qwen2_moe templates

See README.md beside this file. Refuses to write a checkpoint whose logits would not show a mistake.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

import breakage
import checkpoints
import tale
import templates

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def log(line):
    print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def golden(model, case):
    """Prompts, greedy tokens and logits, after every check."""
    chosen = checkpoints.choose_prompts(model, case.seed, log)
    prompts = torch.tensor([prompt for prompt, _, _ in chosen])
    greedy = torch.tensor([tokens for _, tokens, _ in chosen])
    # The yardstick proper: one forward pass over each whole text, no cache.
    logits = torch.cat([model(text[None]).logits for text in torch.cat([prompts, greedy], dim=1)])
    prompt_logits = logits[:, : checkpoints.PROMPT_TOKENS].contiguous()
    std = prompt_logits.std().item()
    tolerance = checkpoints.TOLERANCE_STD * std
    best = logits[:, checkpoints.PROMPT_TOKENS - 1 : -1].topk(2, dim=-1)
    margins = best.values[..., 0] - best.values[..., 1]
    assert std >= checkpoints.LOGITS_STD_MIN, f"{case.name}: logits have a standard deviation of only {std:.2f}"
    assert torch.equal(best.indices[..., 0], greedy), f"{case.name}: cache and full pass disagree"
    assert margins.min() >= checkpoints.MARGIN_TOLERANCES * tolerance, f"{case.name}: a greedy choice is a near-tie"

    mistakes = {}
    for name in case.breakages:
        broken = getattr(breakage, name)(model)(prompts).logits
        mistakes[name] = (broken - prompt_logits).abs().max().item() / tolerance
        enough = mistakes[name] >= checkpoints.BREAKAGE_TOLERANCES
        assert enough, f"{case.name}: '{name}' moves the logits by only {mistakes[name]:.1f} tolerances"
    off = lambda other: (other - prompt_logits).abs().max().item() / tolerance
    rounding = {
        "combine": round(off(breakage.combine_rounding(model, prompts)), 3),
        "cache_f16": round(off(breakage.cache_rounding(model, prompts, torch.float16)), 3),
        "cache_bf16": round(off(breakage.cache_rounding(model, prompts, torch.bfloat16)), 3),
    }
    assert rounding["combine"] <= checkpoints.ROUNDING_TOLERANCES, f"{case.name}: too chaotic to compare, {rounding}"
    log(f"    std {std:.2f}, margin {margins.min() / tolerance:.1f} tolerances, rounding {rounding}")
    log("    " + ", ".join(f"{name} {moved:.0f}" for name, moved in mistakes.items()))
    return prompt_logits, {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "logits_std": std,
        "tolerance": tolerance,
        "logits": {"file": "logits.f32", "shape": list(prompt_logits.shape), "layout": "[prompt][position][token]"},
        "prompts": prompts.tolist(),
        "greedy": greedy.tolist(),
        "greedy_margins": [[round(value, 5) for value in row] for row in margins.tolist()],
        "gate_gap_std_min": min(gap for _, _, gap in chosen),
        "mistakes_in_tolerances": {name: round(moved, 1) for name, moved in mistakes.items()},
        "rounding_in_tolerances": rounding,
    }


def make_checkpoint(case):
    log(f"{case.name}: weights, prompts, golden logits")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / case.name
        checkpoints.write(case, folder)
        logits, facts = golden(checkpoints.load(folder), case)
        (folder / "logits.f32").write_bytes(logits.numpy().astype("<f4").tobytes())
        (folder / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")
        target = FIXTURES / case.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)


def main():
    cases = {case.name: case for case in checkpoints.cases()}
    extra = {"tale-moe": lambda: tale.make(ROOT, FIXTURES, log), "templates": lambda: templates.make(ROOT, FIXTURES, log)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"any of: {' '.join([*cases, *extra])} (default: all)")
    names = parser.parse_args().names or [*cases, *extra]
    torch.manual_seed(0)
    disable_progress_bar()
    torch.set_num_threads(2)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in cases:
            make_checkpoint(cases[name])
        elif name in extra:
            extra[name]()
        else:
            parser.error(f"unknown fixture '{name}'")


if __name__ == "__main__":
    main()
