"""What travels in the archive: request -> text -> tensors -> steps -> text -> response.

Enter at `seq2serve.py`, the module that TorchServe loads, and `seq2seq_handler.py`.
"""
