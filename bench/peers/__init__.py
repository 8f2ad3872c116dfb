"""What `bench.decoding` measures, one module each: our engine (`ours`), other toolkits' LSTMs
(`joeynmt_rnn`, `opennmt_rnn`, `fairseq_lstm`, installed by `install.sh`), what matrix products
alone cost (`floor`), and static batches (`static`).

Those of other toolkits run in environments of their own, so `job`, which all share, imports
nothing but torch. Each can be run alone from the repository's root:

    PEERS/joeynmt/bin/python -m bench.peers.joeynmt_rnn < job.json
"""
