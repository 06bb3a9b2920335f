"""Masks: which documents of a dataset to train on, chosen by their text."""
