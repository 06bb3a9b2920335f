"""Digests, and the check that a communicator can send. vLLM is not imported here."""

import pytest
import torch

from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.weight_transfer import require_enabled


def test_a_digest_covers_bytes_shape_and_dtype():
    tensor = torch.arange(8, dtype=torch.float32)
    variants = [tensor, tensor + 1, tensor.view(2, 4), tensor.view(torch.int32), tensor.bfloat16()]
    assert len({tensor_digest(t) for t in variants}) == len(variants)
    assert tensor_digest(tensor.view(2, 4).T.contiguous().T) == tensor_digest(tensor.view(2, 4))
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor([1.0]))


class Communicator:
    def __init__(self, disabled):
        self.disabled = disabled


@pytest.mark.parametrize("communicator", [None, object(), Communicator(True)])
def test_a_communicator_that_sends_nothing_is_refused(communicator):
    with pytest.raises(RuntimeError, match="disabled"):
        require_enabled(communicator)
    require_enabled(Communicator(False))
