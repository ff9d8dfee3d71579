"""Tracing a function once."""
import threading

import torch
import torch_xla

from nanoxla.tracing import trace_once


def test_a_trace_runs_backward_in_the_callers_thread():
    """Or autograd's thread can hold on to a gradient until the next sync, which then crashes."""
    threads = []

    def gradient(x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            square = y * y
            square.register_hook(lambda _: threads.append(threading.get_ident()))
            return torch.autograd.grad(square.sum(), y)[0]

    result = trace_once(gradient, "this test")(torch.ones(3, device=torch_xla.device()))
    torch_xla.sync()
    assert result.cpu().tolist() == [2, 2, 2] and threads == [threading.get_ident()]
