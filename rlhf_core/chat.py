"""Talk to a model: `python -m rlhf_core.chat --model DIR` (the command `rlhf chat` starts it).

Turns are rendered with the tokenizer's chat template, into which the data stage writes the convention of the training
data (also "Human: … Assistant:"). A tokenizer without one was trained on texts as they are (`data.template: none`), and so
they are taken, one after the other, as with `--raw`. With `--prompt` one answer is printed and the program ends. In the
dialogue `/clear` forgets it and `/quit` (or end of input) leaves.
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
    """The dialogue as the text that asks for the next answer; tokenise it with `add_special_tokens=False` where the
    tokenizer has a chat template, which writes BOS itself.
    """
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return "".join(turn["content"] for turn in turns)


def encode(turns: list[Turn], tokenizer: Any) -> list[int]:
    """The dialogue as the token ids that ask for the next answer."""
    text = render(turns, tokenizer)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


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


def answer(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, seed: int) -> str:
    """One sampled answer to the prompt `ids`."""
    ids = trim(ids, model.config, sampling.max_new_tokens)
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
        turns = [*opening, {"role": "user", "content": args.prompt}]
        ids = list(tokenizer(args.prompt)["input_ids"]) if args.raw else encode(turns, tokenizer)
        print(answer(model, tokenizer, ids, sampling, seed))
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
            reply = answer(model, tokenizer, encode(turns, tokenizer), sampling, seed + len(turns))
            turns.append({"role": "assistant", "content": reply})
            print(f"model> {reply}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
