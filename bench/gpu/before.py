"""What was measured before steps were recorded as they are now: one H100 80 GB with 16 cores,
2026-11-28, torch 2.11.0 (CUDA 13), Python 3.12. 4 + 4 layers of 1,024, vocabulary 32,000, float16
unless said otherwise; TorchServe with a trained model of the Multi30k recipe."""

WHEN = "2026-11-28, one H100 80 GB, torch 2.11.0 (CUDA 13)"
# By beam and rows: milliseconds of a step in a graph, and tokens/s of the engine.
STEPS = {
    (1, 1): (0.209, 2442), (1, 16): (0.261, 23_355), (1, 64): (0.342, 40_507),
    (1, 256): (0.663, 102_660), (1, 1024): (2.37, 93_507), (5, 60): (0.467, 8639),
    (5, 255): (1.00, 20_465), (5, 1020): (2.03, 15_272),
}  # fmt: skip
ENGINE_FLOAT32 = {(1, 1024): 59_905, (5, 1020): 15_422}
KERNELS = {1: 64, 5: 96}  # of a step, by beam
# By format and beam: of how many sentences alone came out as in company.
AS_ALONE = {
    ("float32", 1): 1.0, ("float32", 5): 1.0, ("float16", 1): 1.0, ("float16", 5): 0.92,
    ("bfloat16", 1): 1.0, ("bfloat16", 5): 0.17,
}  # fmt: skip
READY = 8.0  # seconds, with nothing recorded
# By search and clients: requests/s.
SERVED = {
    ("greedy", 1): "87", ("greedy", 64): "1,300", ("greedy", 256): "821 to 875",
    ("beam 5", 1): "50", ("beam 5", 64): "333 to 414", ("beam 5", 256): "232 to 291",
}  # fmt: skip
# By model and sentences of a batch: milliseconds of an update; target words/s where it was told so.
UPDATES = {("Multi30k recipe", 128): "18.6 ms", ("Multi30k recipe", 1024): "20.5 ms",
           ("4x1024", 256): "132,000 words/s"}  # fmt: skip
PUBLISHED = 29_646  # tokens/s of NVIDIA's GNMT v2 with a beam of 5 on a V100 in float16
