"""Which functions ask and read for a criterion."""

from __future__ import annotations

from megatron_sip import config_judge
from megatron_sip.judge.criteria import (
    Form,
    build_classifier,
    build_labels,
    build_likelihood,
    parse_classify,
    parse_labels,
    parse_likelihood,
    parse_pooling,
)
from megatron_sip.judge.reasoned import build_reasoned, parse_reasoned

LIKELIHOOD = Form(build_likelihood, parse_likelihood)
CLASSIFIERS = {
    "classify": Form(build_classifier, parse_classify),
    "pooling": Form(build_classifier, parse_pooling),
}
ANSWERS = {
    "labels": Form(build_labels, parse_labels),
    "reasoned": Form(build_reasoned, parse_reasoned),
}


def form_of(criterion: config_judge.AskedCriterion) -> Form:
    """How a criterion is asked."""
    if isinstance(criterion, config_judge.LikelihoodCriterion):
        return LIKELIHOOD
    if isinstance(criterion, config_judge.ClassifierCriterion):
        return CLASSIFIERS[criterion.route]
    return ANSWERS[criterion.answer.kind]


def needs_tokenizer(criterion: config_judge.AskedCriterion) -> bool:
    """Whether its questions go to the server as token ids."""
    return not (
        isinstance(criterion, config_judge.PromptedCriterion)
        and criterion.answer.kind == "reasoned"
    )
