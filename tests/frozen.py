"""Imported last by the server of tests/forked.py: a fork's collector then leaves alone what the server holds,
whose pages all forks share until one of them writes."""

import gc

gc.collect()
gc.freeze()
