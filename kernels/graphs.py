"""Shorter decoding steps: compiled layers, and CUDA graphs, which launch all kernels at once."""

import functools

import torch

from model import Layer

@functools.cache
def compile_layers():
    """torch.compile what stands around attention, for one token. (Prompts differ in length and gain
    little.) The option tunes products of one row with a matrix: they take most time."""
    def for_one_token(method):
        compiled = torch.compile(method, options={"coordinate_descent_tuning": True})
        return lambda layer, x, *more: (compiled if x.shape[1] == 1 else method)(layer, x, *more)

    Layer.before_attention = for_one_token(Layer.before_attention)
    Layer.after_attention = for_one_token(Layer.after_attention)

class Replayed:
    """A function without arguments that becomes a CUDA graph with its third call, if record() says
    so then. The first two calls let kernels compile and libraries find their memory. after_replay()
    does for a replay what Python did beside launching, such as counting tokens."""

    def __init__(self, function, after_replay, record):
        self.function, self.after_replay, self.record = function, after_replay, record
        self.calls, self.graph = 0, None

    def __call__(self):
        self.calls += 1
        if self.graph is not None:
            self.graph.replay()
            self.after_replay()
        elif self.calls == 3 and self.record():
            self.graph = torch.cuda.CUDAGraph()
            # The device does nothing here, but Python counts. "thread_local", for the thread that
            # watches over several GPUs asks the device for its state meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self.function()
            self.graph.replay()
        else:
            return self.function()
        return self.output
