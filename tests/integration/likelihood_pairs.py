"""A judge of pairs that can be believed, where no model here can be one: a rule over likelihoods.

It answers the real pairwise prompt, as a server would: it reads prefix and options out of the token
ids, asks a vLLM server how likely each option is, and gives the first label the probability
1 / (1 + exp(-(difference of the mean log-probs) / TEMPERATURE)). By itself it runs a recipe:

python tests/integration/likelihood_pairs.py --config configs/quickstart.toml \
    --set run.dir=runs/pairs

That starts the recipe's server "judge", puts a pairwise criterion under the schedule `adaptive` in
the place of its likelihood criterion, and trains with two ranks under torchrun.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "unit"))

from judge_helpers import labels_reply, scripted_server  # noqa: E402

from megatron_sip.judge.prompts import load_prompt  # noqa: E402
from megatron_sip.judge.text_model import JudgeTokenizer  # noqa: E402
from megatron_sip.recipe import load_config  # noqa: E402
from megatron_sip.serving.client import Endpoint, HttpClient  # noqa: E402
from megatron_sip.serving.text_fleet import text_fleet  # noqa: E402

NAME, KEY_VARIABLE = "pairs", "MEGATRON_SIP_PAIRS_JUDGE_KEY"
PROMPT = "quality_pairwise_v2"
TEMPERATURE = 0.1  # nats a token
WEIGHT = 3.0  # of the win rate; beside the quickstart's novelty it orders pools about as likelihood
MARKED = re.compile(r"\[([0-9a-f]{8})\n(.*?)\n\1\]", re.DOTALL)
DEADLINE_S = 300.0


class LikelihoodPairs:
    """Answers label questions on pairs; counts them."""

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        """Args: endpoint: of a vLLM server that gives prompt log-probs. folder: its model."""
        self.num_questions = 0
        self._endpoint, self._tokenizer = endpoint, JudgeTokenizer(folder)
        self._decoder = self._tokenizer._trusted
        self._labels = [self._tokenizer.label_id(x) for x in load_prompt(PROMPT).labels]
        self._known: dict[tuple[str, str], asyncio.Future[float]] = {}
        self._slots = asyncio.Semaphore(16)

    async def answer(self, path: str, body: dict[str, Any]) -> Any:
        """The reply to one request for a verdict."""
        if path != "/v1/completions":
            return 404, {}, "not here"
        self.num_questions += 1
        text = self._decoder.decode(body["prompt"], skip_special_tokens=False)
        prefix, first, second = (found[2] for found in MARKED.finditer(text))
        gap = await self._likelihood(prefix, first) - await self._likelihood(prefix, second)
        share = 1 / (1 + math.exp(-max(-50.0, min(50.0, gap / TEMPERATURE))))
        logprobs = [math.log(max(share, 1e-12)), math.log(max(1 - share, 1e-12))]
        return labels_reply(dict(zip(self._labels, logprobs, strict=True)))

    async def _likelihood(self, prefix: str, option: str) -> float:
        """Mean log-prob of the option's tokens, nats."""
        key = prefix, option
        if key not in self._known:
            self._known[key] = asyncio.ensure_future(self._ask(prefix, option))
        return await self._known[key]

    async def _ask(self, prefix: str, option: str) -> float:
        ids, places = self._tokenizer.encode_continuation(
            prefix, continuation=option, white_space=False
        )
        body = {"model": self._endpoint.model, "prompt": ids, "max_tokens": 1, "temperature": 0}
        async with self._slots, HttpClient(self._endpoint, concurrency=1) as client:
            reply = await client.post(
                "/v1/completions", body | {"prompt_logprobs": 0}, deadline_s=DEADLINE_S
            )
        rows = reply["choices"][0]["prompt_logprobs"]
        values = [rows[i][str(ids[i])]["logprob"] for i in places if i]
        return math.fsum(values) / len(values)


def as_tables(key: str, value: Any) -> str:
    """--set argument; TOML of a list of tables or of a table."""

    def text(x: Any) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{k} = {text(v)}" for k, v in x.items()) + "}"
        return "[" + ", ".join(map(text, x)) + "]" if isinstance(x, list) else json.dumps(x)

    return f"{key}={text(value)}"


@contextmanager
def pairwise_overrides(
    recipe: Path, overrides: Sequence[str], *, budget: float, log_dir: Path
) -> Iterator[tuple[list[str], dict[str, str], LikelihoodPairs]]:
    """Starts the recipe's server "judge" and the judge of pairs.

    Yields: further --set values for the recipe, variables for the environment, and the judge.
    """
    config = load_config(recipe, tuple(overrides))
    assert config.judge is not None
    folder = Path(config.servers["judge"].model)
    with text_fleet(config, ["judge"], log_dir=log_dir, say=print) as servers:
        endpoint = servers.endpoints()["judge"]
        judge = LikelihoodPairs(endpoint, folder)
        with scripted_server(judge.answer, model=NAME) as url:
            connect = {"kind": "connect", "tokenizer": str(folder)}
            by_pairs = {"form": "pairwise", "name": "quality", "server": NAME, "prompt": PROMPT}
            others = [c.model_dump() for c in config.judge.criteria if c.form != "likelihood"]
            others = [{k: v for k, v in c.items() if v is not None} for c in others]
            values = {
                "servers.judge": connect | {
                    "url": endpoint.url, "model": endpoint.model, "api_key_env": KEY_VARIABLE,
                },
                f"servers.{NAME}": connect | {"url": url, "model": NAME},
                "judge.criteria": [by_pairs | {"weight": WEIGHT}, *others],
                "judge.schedule": {"name": "adaptive", "budget": budget},
            }  # fmt: skip
            sets = [as_tables(key, value) for key, value in values.items()]
            yield sets, {KEY_VARIABLE: endpoint.api_key}, judge


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe with a server judge")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--budget", type=float, default=0.25, help="share of all pairs to ask")
    arguments = parser.parse_args()
    with pairwise_overrides(
        arguments.config, arguments.overrides, budget=arguments.budget, log_dir=ROOT / "runs/logs"
    ) as (sets, environment, judge):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += [str(ROOT / "pretrain_sip.py"), "--config", str(arguments.config)]
        for value in (*arguments.overrides, *sets):
            command += ["--set", value]
        variables = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment | variables)
        print(f"questions on pairs: {judge.num_questions}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
