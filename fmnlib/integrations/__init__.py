"""Callbacks that record the training loops of other frameworks."""
