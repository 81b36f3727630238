"""Talk to a model: `python -m rlhf_core.chat --model DIR` (the command `rlhf chat` starts it).

Turns are rendered with the tokenizer's chat template where it has one, else as "Human: … Assistant:" like the training data.
With `--prompt` one answer is printed and the program ends; with `--raw` the prompt is taken
as it is. In the dialogue `/clear` forgets it and `/quit` (or end of input) leaves.
"""

import argparse
import sys
import time
from typing import Any

import torch

from rlhf_core.errors import ConfigError, RlhfError
from rlhf_core.models import load_causal_lm, load_tokenizer, positions_of
from rlhf_core.rollout import Sampling, generate

Turn = dict[str, str]


def render(turns: list[Turn], tokenizer: Any) -> str:
    """The dialogue as the text that asks for the next answer."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names[t['role']]}: {t['content']}" for t in turns) + "\n\nAssistant:"


def trim(ids: list[int], config: Any, room: int) -> list[int]:
    """The end of a prompt that leaves `room` positions for the answer."""
    limit = positions_of(config)
    if limit is None or len(ids) + room <= limit:
        return ids
    if limit <= room:
        raise ConfigError(
            f"--max-new-tokens {room} leaves no room for a prompt in the model's {limit} positions; lower it"
        )
    return ids[-(limit - room) :]


def answer(model: Any, tokenizer: Any, text: str, sampling: Sampling, seed: int) -> str:
    """One sampled answer to `text`."""
    ids = trim(tokenizer(text)["input_ids"], model.config, sampling.max_new_tokens)
    if not ids:
        raise ConfigError("--prompt: is empty; write something")
    eos = tokenizer.eos_token_id
    rollout = generate(model, [ids], [0], sampling, seed=seed, eos=eos, pad=tokenizer.pad_token_id)
    reply = tokenizer.decode(rollout.responses()[0], skip_special_tokens=True)
    return reply.split("\n\nHuman:")[0].strip()


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf chat", description="Talk to a model.")
    parser.add_argument("--model", required=True, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--raw", action="store_true", help="take --prompt as it is, without turn markers")
    parser.add_argument("--system", help="system message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=None, help="default: 128, or half of a smaller model's positions"
    )
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    args = parser.parse_args(argv)
    try:
        talk(args)
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


def talk(args: argparse.Namespace) -> None:
    """Load the model and hold the dialogue."""
    if args.temperature <= 0 or not 0 < args.top_p <= 1 or (args.max_new_tokens or 1) < 1:
        raise ConfigError("--temperature must be above 0, --top-p in (0, 1], --max-new-tokens at least 1")
    seed = int(time.time()) if args.seed is None else args.seed
    tokenizer = load_tokenizer(args.model)
    model = load_causal_lm(args.model, dropout=0.0).eval()
    room = args.max_new_tokens or min(128, (positions_of(model.config) or 256) // 2)
    sampling = Sampling(room, args.temperature, top_p=args.top_p)
    opening: list[Turn] = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        text = args.prompt if args.raw else render([*opening, {"role": "user", "content": args.prompt}], tokenizer)
        print(answer(model, tokenizer, text, sampling, seed))
        return
    print("Write a message; /clear forgets the dialogue, /quit leaves.")
    turns = list(opening)
    while True:
        try:
            line = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/clear":
            turns = list(opening)
        elif line:
            turns.append({"role": "user", "content": line})
            reply = answer(model, tokenizer, render(turns, tokenizer), sampling, seed + len(turns))
            turns.append({"role": "assistant", "content": reply})
            print(f"model> {reply}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
