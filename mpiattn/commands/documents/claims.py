"""Claims of the documents: the article's sections, and the paper's abstract. Ring first, then mesh."""

SPEEDUP = {4: (3.2, 3.6), 16: (8.1, 12.4), 64: (18.3, 38.7), 256: (42.7, 142.3)}
"""Section 3.2: speed-up by devices; hardware and length aren't said."""

COMMUNICATION = {
    (32, 4): (1.2, 1.1, 8),
    (32, 16): (1.0, 1.4, 40),
    (32, 64): (0.7, 1.6, 129),
    (128, 16): (3.8, 4.2, 11),
    (128, 64): (2.1, 5.1, 143),
}
"""Section 5.1: GB/s of ring and mesh and improvement in percent, by thousands (1024) of tokens and devices."""

TRAINING = {4: (12.4, 13.1), 8: (22.1, 25.8), 16: (38.7, 52.3), 32: (52.3, 89.7), 64: (61.8, 148.2)}
"""Section 5.2: thousands of tokens a second, "a GPU", LLaMA-7B at 32K tokens, by devices."""

WEAK = {4: (3.8, 3.9), 16: (12.1, 15.2), 64: (28.7, 52.8), 256: (61.3, 178.4)}
"""Section 5.3: speed-up with 8K tokens a GPU, by devices."""

FASTER_AVERAGE, FASTER_MOST = 2.9, 3.4
"""The paper's abstract: times as fast as Ring Attention on 256 GPUs."""

LESS_AVERAGE, LESS_MOST = 79.0, 85.4
"""The paper's abstract: percent less volume than Ring Attention on 256 GPUs."""
