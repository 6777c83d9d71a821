"""Which of two flashes came first? Attention over the frames of a clip, spread over MPI ranks, learns to tell.

A clip is 1,024 frames of noise, with a bright square in the left half of 16 of them and one in the right half of 16
others. Each frame is encoded by itself, attention runs over all frames, and their mean is read out:

    h = gelu(W_e frame)        x = h + W_o attention(W_q h, W_k h, W_v h)        answer = W_a mean(x)

Order in time comes in by the causal mask alone: a frame attends to itself and those before it. There is no encoding of
positions, so with --no-attention, where a frame attends to itself only, the mean is the same for a clip and for the
same clip played backwards, whose answer is the other one. All else stays: weights, clips, and steps.

To run: mpiexec -n 4 python examples/video.py
A clip of your own, judged at the end (pip install imageio; for films imageio[pyav]): ... --clip FILE
"""

import argparse
import sys

import numpy as np
from mpi4py import MPI

import mpiattn
from mpiattn.commands.root import on_root
from mpiattn.messages.reduction import all_reduce
from mpiattn.models import layers
from mpiattn.models.adamw import AdamW
from mpiattn.models.attention_layer import AttentionLayer

SIDE, LASTS, BRIGHT = 8, 16, 6  # pixels of a frame each way; frames of a flash; its brightness, where the noise has 1
BATCH, FEATURES, HEADS, RATE = 8, 16, 1, 0.02
TRAINING, HELD_OUT = 1, 2


def clips(frames, purpose, number):
    """Return a batch of clips, (clips, frames, pixels), and whether the left flash came first, (clips,): 1 or 0."""
    rng = np.random.default_rng([purpose, number])
    pixels = rng.standard_normal((BATCH, frames, SIDE, SIDE), np.float32)
    starts = LASTS * rng.random((BATCH, frames // LASTS)).argsort(axis=1)[:, :2]  # of left and right; never the same
    corners = rng.integers(0, SIDE // 2 - 2, (BATCH, 2, 2)) + np.diag([0, SIDE // 2])  # (row, column) of left, right
    for clip, half in np.ndindex(BATCH, 2):
        start, (row, col) = starts[clip, half], corners[clip, half]
        pixels[clip, start : start + LASTS, row : row + 3, col : col + 3] += BRIGHT
    return pixels.reshape(BATCH, frames, -1), (starts[:, 0] < starts[:, 1]).astype(np.int64)


def read(path):
    """Return the frames of a file as a clip, (1, frames, pixels): grey, small, and as bright as the noise."""
    from imageio.v3 import imiter

    small = []
    for frame in imiter(path):  # (height, width) or (height, width, colours)
        if min(frame.shape[:2]) < SIDE:
            raise ValueError(f"its frames are smaller than {SIDE} x {SIDE} pixels")
        grey = frame.reshape(*frame.shape[:2], -1)[..., :3].mean(axis=-1)
        rows = np.array_split(grey, SIDE)
        small.append([part.mean() for row in rows for part in np.array_split(row, SIDE, axis=1)])
    clip = np.array([small], np.float32)
    return (clip - clip.mean()) / (clip.std() + 1e-6)


class Video:
    """The model and its optimiser; `frames` of its methods are this rank's, (clips, frames, pixels)."""

    def __init__(self, comm, attention=True, dtype=np.float32):
        mask = mpiattn.Causal() if attention else mpiattn.SlidingWindow(0, 0)
        self.layer = AttentionLayer(FEATURES, HEADS, comm=comm, algorithm="mesh", mask=mask, dtype=dtype)
        rng = np.random.default_rng(0)
        shapes = {"W_e": (FEATURES, SIDE * SIDE), "b_e": FEATURES, "W_a": (2, FEATURES), "b_a": 2}
        own = {name: (0.1 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
        self.weights = {**own, **self.layer.weights}
        self.optimiser = AdamW(self.weights, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)

    def forward(self, frames, length):
        """Return the logits of clips of so many frames, (clips, 2), on every rank; and what `backward` needs."""
        w = self.weights
        encoded = layers.linear(frames, w["W_e"], w["b_e"])  # (clips, frames, features)
        h = layers.gelu(encoded)
        out, saved = self.layer.forward(h)
        mean = (h + out).sum(axis=1) / length  # (clips, features): this rank's share of it,
        all_reduce(self.layer.attention.comm, mean)  # and the whole
        return layers.linear(mean, w["W_a"], w["b_a"]), (frames, length, encoded, mean, saved)

    def backward(self, d_logits, kept):
        """Return the gradients of the weights, summed over all ranks."""
        (frames, length, encoded, mean, saved), g = kept, {}
        d_mean, g["W_a"], g["b_a"] = layers.linear_backward(d_logits, mean, self.weights["W_a"])  # of all frames
        d_x = np.repeat(d_mean[:, None] / length, frames.shape[1], axis=1)  # (clips, frames, features)
        d_h, of_layer = self.layer.backward(d_x, saved)
        d_encoded = layers.gelu_backward(d_x + d_h, encoded)
        _, g["W_e"], g["b_e"] = layers.linear_backward(d_encoded, frames, self.weights["W_e"])
        for name in ("W_e", "b_e"):  # of this rank's frames
            all_reduce(self.layer.attention.comm, g[name])
        return {**g, **of_layer}

    def batch(self, frames, purpose, number):
        """Return logits and right answers of a batch of clips, made on every rank; and what `backward` needs."""
        pixels, answers = clips(frames, purpose, number)
        mine = pixels[:, self.layer.attention.positions(frames)].astype(self.weights["W_e"].dtype)
        logits, kept = self.forward(mine, frames)
        return logits, answers, kept

    def train(self, frames, steps):
        """Do the next of so many steps; return its loss, and the share of its clips that were judged rightly."""
        logits, answers, kept = self.batch(frames, TRAINING, self.optimiser.steps)
        gradients = self.backward(layers.cross_entropy_backward(1 / BATCH, logits, answers), kept)
        self.optimiser.step(gradients, RATE * (1 - self.optimiser.steps / steps))
        return layers.cross_entropy(logits, answers).mean(), (logits.argmax(axis=1) == answers).mean()

    def held_out(self, frames, batches):
        """Return the share of clips it has never seen that are judged rightly."""
        judged = (self.batch(frames, HELD_OUT, number)[:2] for number in range(batches))
        return np.mean([logits.argmax(axis=1) == answers for logits, answers in judged])


def given(args):
    """Return the user's clip, None where there is none."""
    if args.frames < 2 * LASTS or args.steps < 1:
        raise ValueError(f"two flashes take {2 * LASTS} frames, and training takes a step")
    try:
        return read(args.clip) if args.clip else None
    except Exception as error:  # imageio's are of many kinds
        raise ValueError(f"--clip {args.clip}: {error}") from None


def main():
    """Train, print a line now and then, and judge clips held out and one of the user's."""
    parser = argparse.ArgumentParser(description="Learn which of two flashes in a clip came first.")
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-attention", action="store_true", help="a frame attends to itself only")
    parser.add_argument("--clip", metavar="FILE", help="a clip that is judged at the end")
    args, comm, curve = parser.parse_args(), MPI.COMM_WORLD, []
    try:
        clip = on_root(comm, lambda: given(args))  # None on the other ranks
    except mpiattn.InputError as error:
        sys.exit(f"error: {error}" if comm.rank == 0 else 2)
    video = Video(comm, not args.no_attention)
    for step in range(1, args.steps + 1):
        curve.append(video.train(args.frames, args.steps))
        if comm.rank == 0 and step % 10 == 0:
            print("step {:4}  loss {:.4f}  right {:4.0%}".format(step, *np.mean(curve[-10:], axis=0)), flush=True)
    right = video.held_out(args.frames, 50)
    if comm.rank == 0:
        print(f"of {50 * BATCH} clips held out right: {right:.1%}")
    if args.clip:
        length = comm.bcast(clip.shape[1] if comm.rank == 0 else None)
        logits, _ = video.forward(mpiattn.scatter(clip, comm, video.layer.attention.layout, axis=1), length)
        if comm.rank == 0:
            print(f"{args.clip}, {length} frames: the {('right', 'left')[logits.argmax()]} flash came first")


if __name__ == "__main__":
    main()
