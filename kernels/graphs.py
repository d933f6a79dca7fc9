"""Decoding steps as CUDA graphs: all of a step's kernels in one launch."""

import torch


class Recorded:
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
            with torch.cuda.graph(self.graph):  # the device does nothing here, but Python counts
                self.output = self.function()
            self.graph.replay()
        else:
            return self.function()
        return self.output
