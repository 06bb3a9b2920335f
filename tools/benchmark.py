"""Measure a part of the trainer on this machine against the plain way to do the same.

python tools/benchmark.py loss-head
OMP_NUM_THREADS=1 python tools/benchmark.py loss-head --json > loss_head.json
"""

from __future__ import annotations

import argparse
import json
import sys

HELP = """benchmarks:
  checkpoint     save, load and verify checkpoints of 135 M, 360 M and 1.1 B parameters, and what
                 an asynchronous save stops the training for; ratios blocked_*, save_*
  dataset-start  first batch of 10^12 tokens in 10,000 files, and of 10^9 tokens against
                 Megatron-Core's GPTDataset; ratios speedup, first_batch_s
  judge-attacks  attacks on SmolLM2 behind vLLM: shift of label verdicts against harmless texts,
                 reasoned verdicts that get better; ratios label_structural, reasoned_better
  judge-client   verdicts a second of a server that takes 50 ms, many questions in flight against
                 one; ratio speedup
  judge-schedules  gap between picked best and worst that a schedule keeps of all pairs, on
                 simulated judges; ratios gap_share_mean, gap_share_worst, question_share
  judge-tokens   prompt tokens that vLLM computes for a pool's verdicts, options first and all
                 pairs against prefix first and adaptive; ratios prompt_tokens, layout, schedule,
                 decoded_tokens
  loss-head      log-probs block by block against Megatron-Core's logits and cross entropy;
                 ratios memory, time_h256, time_h2048
  preprocess     text to .bin/.idx against a script of Megatron's form;
                 ratios throughput_json, throughput_sentencepiece, memory_at_5x
  shared-prefix  the update on rows that share a prefix against padded rows;
                 ratios grpo_k16, dpo_pair (and _long), padded / shared
  weight-sync    weights of 10 M, 135 M and 10^9 parameters through shared memory against a plain
                 copy, digest, apply and pause apart; the plan for H100; ratio memcpy_share

Ratios of loss-head are ours / plain, those called throughput, speedup or by an objective plain /
ours; times are medians of interleaved repetitions. Nothing else should run on the machine: a
neighbour that takes the memory bandwidth shifts ratios, too."""


def main() -> int:
    from megatron_sip.benchmark import BENCHMARKS, run, text

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    found = run(arguments.name)
    print(json.dumps(found) if arguments.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
