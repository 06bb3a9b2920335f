"""Which documents a step of a run learns from, and at which steps a document comes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import Config
from megatron_sip.data.blended_corpus import BlendedCorpus, open_corpus
from megatron_sip.data.manifest import load_manifest
from megatron_sip.data.provenance import read_row
from megatron_sip.data.sampler import PrefixSuffixSampler
from megatron_sip.data.storage import local_part
from megatron_sip.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Use:
    """A document in a step.

    Args: step: from 1, as metrics.jsonl counts. position: of the sample in the step's batch.
          prefix: dataset. document: number in it. cut: index of the first suffix token.
          source: file and record that the document came from, "" where that is not known.
    """

    step: int
    position: int
    prefix: str
    document: int
    cut: int
    source: str


def open_train(config: Config) -> tuple[BlendedCorpus, PrefixSuffixSampler]:
    """The train split of a recipe, and its order of samples."""
    data = config.data
    tokenizer = Tokenizer.load(data.tokenizer)
    corpus = open_corpus(
        data.train,
        min_tokens=data.min_prefix_tokens + data.suffix_tokens,
        cache_dir=data.cache_dir,
    )
    corpus.check_tokenizer(tokenizer.digest, path=data.tokenizer)
    return corpus, PrefixSuffixSampler(
        corpus,
        prefix_tokens=data.prefix_tokens,
        min_prefix_tokens=data.min_prefix_tokens,
        suffix_tokens=data.suffix_tokens,
        seed=config.run.seed,
        word_starts=tokenizer.word_starts,
        eod=tokenizer.eod,
    )


def when(config: Config, step: int) -> list[Use]:
    """The documents of a step, in the order of the batch.

    Raises: ValueError if the step is not in 1..run.steps, or the data cannot be read.
    """
    if not 1 <= step <= config.run.steps:
        raise ValueError(f"--step {step} must be in 1..run.steps {config.run.steps}")
    corpus, sampler = open_train(config)
    batch = config.data.global_batch_size
    return [_use(config, corpus, sampler, (step - 1) * batch + p) for p in range(batch)]


def where(config: Config, prefix: str, document: int) -> list[Use]:
    """Every use of a document in the whole run, in order of steps.

    Args:   prefix: of the dataset, as the recipe's patterns give it. document: number in it.
    Raises: ValueError if the recipe has no such dataset, or it no such document.
    """
    corpus, sampler = open_train(config)
    last = config.run.steps * config.data.global_batch_size
    found = []
    for number, part in enumerate(corpus.parts):
        if prefix not in part.prefixes:
            continue
        file = part.prefixes.index(prefix)
        samples = sampler.samples_of(number, part.number_of(file, document), last=last)
        found += [_use(config, corpus, sampler, i) for i in samples]
    if not any(prefix in part.prefixes for part in corpus.parts):
        names = [p for part in corpus.parts for p in part.prefixes]
        raise ValueError(
            f"{prefix} is none of the {len(names)} datasets of data.train ({', '.join(names[:5])})"
        )
    return sorted(found, key=lambda use: (use.step, use.position))


def _use(config: Config, corpus: BlendedCorpus, sampler: PrefixSuffixSampler, i: int) -> Use:
    """What sample i is made of."""
    origin = sampler.origin(i)
    part = corpus.parts[origin.part]
    file, document = part.locate(origin.document)
    step, position = divmod(i, config.data.global_batch_size)
    prefix = part.prefixes[file]
    return Use(
        step + 1, position, prefix, document, sampler[i].cut, _source(config, prefix, document)
    )


def _source(config: Config, prefix: str, document: int) -> str:
    """File and record of a document, "" if its dataset does not say."""
    cache_dir = config.data.cache_dir
    path = local_part(prefix, ".documents.parquet", cache_dir=cache_dir)
    manifest = load_manifest(local_part(prefix, ".manifest.json", cache_dir=cache_dir))
    row = read_row(path, document)
    return f"{manifest.sources[row['source']].path}:{row['record']}" if row["source"] >= 0 else ""
