"""Objectives by name: `select` picks what to train on, `loss` says how; both pure."""

from megatron_sip.objectives import dpo, nll

OBJECTIVES = {
    "nll": (nll.select_suffix, nll.loss),
    "rf_nll": (nll.select_best, nll.loss),
    "dpo": (dpo.select, dpo.loss),
}
