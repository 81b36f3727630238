"""The process behind `rlhf eval`: a request as JSON on stdin, the result as JSON on stdout, progress and errors on stderr.

With `out` the result lies there too, as eval.json, beside the mode's own files. Exit codes are those of all jobs.
"""

import json
import sys
from pathlib import Path

from rlhf_core.errors import RlhfError
from rlhf_core.eval.request import EvalRequest, Result


def run(request: EvalRequest) -> Result:
    """Evaluate; imports only what the mode needs."""
    if request.mode == "reward":
        from rlhf_core.eval.reward import evaluate_reward as evaluate
    elif request.mode == "language":
        from rlhf_core.eval.language import evaluate_language as evaluate
    elif request.mode == "compare":
        from rlhf_core.eval.compare import evaluate_pair as evaluate
    else:
        from rlhf_core.eval.frontier import evaluate_frontier as evaluate
    result = evaluate(request)
    if request.out:
        folder = Path(request.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval.json").write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def main() -> int:
    """Answer one request; returns the exit code."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no part of the answer
    try:
        result = run(EvalRequest.model_validate_json(sys.stdin.read()))
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    json.dump(result, stdout, ensure_ascii=False, allow_nan=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
