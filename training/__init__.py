"""From parallel text to an archive that TorchServe loads: `python -m training VERB RECIPE`.

Enter at `__main__.py`; the verbs are, in the order of the data: prepare, train, evaluate,
export, archive, translate. Each reads one recipe and the run folder that the verb before left.
"""
