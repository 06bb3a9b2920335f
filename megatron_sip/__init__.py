"""Self-Improving Pretraining (SIP, arXiv 2601.21343) on Megatron-Core."""

__version__ = "0.1.0"
