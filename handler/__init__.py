"""What travels in the archive: request -> text -> tensors -> steps -> text -> response.

Enter at `seq2seq_handler.py`, the module that TorchServe loads.
"""
