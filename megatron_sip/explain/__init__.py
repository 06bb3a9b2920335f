"""What a run will do and cost, before it begins (`pretrain_sip.py --explain`)."""
