"""Entry point that vLLM loads in every server process: makes our weight-transfer backend known.

It only names the class; the module that defines it is imported when a server asks for it.
"""


def register() -> None:
    """Register the `shared_memory` backend (idempotent: vLLM may load plugins twice)."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if "shared_memory" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "shared_memory", "megatron_sip.rollout.shared_memory_worker", "SharedMemoryEngine"
        )
